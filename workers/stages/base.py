"""The four kinds of stage, and the pipeline they form.

A stage is a frozen dataclass of parameters; it holds no tensors and no state. What it decides is carried out by
``workers.cache``: protection of sinks and recent tokens, top-k, compaction, shadows, byte accounting.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar, Self

import torch

from kernels.layout import BLOCK_TOKENS, BlockFormat, CacheShape, Format, Tier
from kvpilot.bounds import ANY, TRUTH, Bounds
from kvpilot.pipeline import StageSpec, format_pipeline
from workers.cache.formats import CodedFormat, coded_format
from workers.profile.profile import LayerProfile, ModelProfile, missing
from workers.stages.attended import Attended, attend_blocks
from workers.stages.budgets import RULES, UNIFORM

Ages = tuple[tuple[int, BlockFormat], ...]
"""How many tokens must be younger than a block, and the format it then has; rising."""
Places = tuple[tuple[int, Tier], ...]
"""The same for its tier."""


class LossClass(Enum):
    """What a stage does to the logits; ordered from harmless to harmful."""

    EXACT = 1
    RECOVERABLE = 2
    PERMANENT = 3


class Kind(Enum):
    """What a stage decides; a pipeline has at most one stage of each kind, in this order."""

    FULL = "full"
    EVICT = "evict"
    COMPRESS = "compress"
    OFFLOAD = "offload"


@dataclass(frozen=True)
class LayerView:
    """What an evictor may look at: the tokens one layer keeps now. H KV heads, T tokens; all on the model's device."""

    index: int  # which layer
    layers: int  # how many there are
    position: torch.Tensor  # int32 [H, T] original positions, rising; entries behind a shorter table mean nothing
    valid: torch.Tensor  # bool [H, T] which entries are tokens
    mass: torch.Tensor  # float32 [H, T] attention received from all queries since the token was kept track of
    votes: torch.Tensor  # float32 [H, T] attention received from about the last 64 queries
    seen: int  # tokens of the request so far, kept or not
    scaling: float  # the model's factor on attention scores
    read: Callable[[], tuple[torch.Tensor, torch.Tensor]]  # K and V, each [H, T, D], dequantised where need be
    queries: Callable[[int], tuple[torch.Tensor, torch.Tensor]]
    """The last queries, at most so many: [query heads, n, D] and their positions [n], rising. There are 1 to 32."""
    profile: LayerProfile | None = None
    """What the model's profile says of this layer. It is there, with all that the stage ``needs``, if that is any."""
    reconstruction: torch.Tensor | None = None
    """float32 [H, T] the most attention each token received while the model repeated the text; 1, the most there can
    be, for tokens that came later. None where it was not made: it is for evictors that say they need it."""
    novelty: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    """float32 [H, T] surprise -log p (nats) of each token when it came; NaN where it was not noted."""

    def attention(self, last: int) -> torch.Tensor:
        """What the last queries, at most ``last``, pay to the tokens that are kept now: float32 [H, G, n, T].

        G query heads read a KV head. Each query's shares sum to 1; it pays nothing to tokens behind its own position.
        """
        queries, asked_at = self.queries(last)
        keys, _ = self.read()
        heads, tokens, dim = keys.shape
        grouped = queries.reshape(heads, -1, dim)  # [H, G * n, D]
        scores = grouped @ keys.float().mT * self.scaling
        scores = scores.view(heads, -1, len(asked_at), tokens)
        scores = scores.masked_fill(~self.visible(asked_at)[:, None], -torch.inf)
        return scores.softmax(-1).nan_to_num(0.0)  # nothing that a query may see: no shares

    def visible(self, asked_at: torch.Tensor) -> torch.Tensor:
        """Which of the tokens that are kept now queries at these positions [n] may see: bool [H, n, T]."""
        return (self.position[:, None] <= asked_at[:, None]) & self.valid[:, None]


def parameter(default: Any, bounds: Bounds = ANY, of: str = "", minor: bool = False) -> Any:
    """A stage's parameter: its default, what it accepts, and of what it is a number, in words.

    A minor one is left out of pipeline text while it has its default.
    """
    return dataclasses.field(default=default, metadata={"bounds": bounds, "of": of, "minor": minor})


def whole_blocks(default: int) -> Any:
    """A parameter that counts recent tokens left alone: at least one block."""
    return parameter(default, Bounds(least=BLOCK_TOKENS), "tokens")


def budgets() -> Any:
    """The parameter of evictors that can give layers and heads different shares of what is kept."""
    return parameter(UNIFORM, Bounds(choices=RULES), minor=True)


def shadow() -> Any:
    """The parameter of lossy stages: keep an exact copy on the host tier, so that a switch can undo the loss."""
    return parameter(True, TRUTH, minor=True)


def accepted(field: dataclasses.Field[Any]) -> str:
    """What a parameter accepts, in words."""
    bounds, of = str(field.metadata["bounds"]), field.metadata["of"]
    return f"{bounds} ({of})" if of else bounds


@dataclass(frozen=True)
class Stage:
    """One policy object of a pipeline.

    Raises:
        ValueError: naming the parameter, its value and what is accepted.
    """

    name: ClassVar[str]
    kind: ClassVar[Kind]
    summary: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    """Of the model's profile (``workers.profile.profile``), the tensors, or ``ROPE``, that it cannot do without."""

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            if not spec.metadata["bounds"].accept(value):
                raise ValueError(
                    f"parameter {spec.name!r} of stage {self.name!r}: {value!r} given; accepted: {accepted(spec)}"
                )

    @property
    def loss_class(self) -> LossClass:
        """What this stage does to the logits."""
        raise NotImplementedError

    def without_shadow(self) -> Self:
        """The same without an exact copy of what it loses."""
        return self

    def refuses(self, shape: CacheShape) -> str | None:
        """Why this stage cannot serve a model, or None if it can."""
        return None

    def refuses_beside(self, other: Stage) -> str | None:
        """Why it cannot be in one pipeline with another stage, whatever the parameters of both; None: it can."""
        return None

    def lacks(self, available: Collection[str]) -> str | None:
        """What it needs of a profile beyond these tensors, and how to get it; None if nothing."""
        return missing(self.needs, available)

    def spec(self) -> StageSpec:
        """This stage as pipeline text writes it; equal stages are written alike."""
        values = ((spec, getattr(self, spec.name)) for spec in dataclasses.fields(self))
        written = ((spec.name, value) for spec, value in values if value != spec.default or not spec.metadata["minor"])
        return StageSpec(self.name, tuple(written))


@dataclass(frozen=True)
class LayerPlace:
    """A layer of which blocks are to be stored: what codecs and placers may go by."""

    index: int
    shape: CacheShape
    seen: int  # tokens of the request so far, kept or not
    profile: LayerProfile | None = None
    """What the model's profile says of this layer. It is there, with all that the stage ``needs``, if that is any."""


@dataclass(frozen=True)
class Lossy(Stage):
    """A stage whose loss a shadow can undo."""

    @property
    def loss_class(self) -> LossClass:
        """Recoverable with a shadow, else permanent."""
        return LossClass.RECOVERABLE if getattr(self, "shadow", False) else LossClass.PERMANENT

    def without_shadow(self) -> Self:
        """The same without an exact copy: its loss is permanent."""
        return dataclasses.replace(self, shadow=False) if getattr(self, "shadow", False) else self  # type: ignore[call-arg]


@dataclass(frozen=True)
class Evictor(Lossy):
    """Chooses which tokens stay: per head the ``budget`` tokens of highest score.

    The cache calls an evictor when the prompt is complete or the request is switched to it, and, if
    ``evicts_while_decoding``, again each time 32 more tokens have come.
    """

    kind: ClassVar[Kind] = Kind.EVICT
    evicts_while_decoding: ClassVar[bool] = True
    needs_prompt_mass: ClassVar[bool] = False
    """Whether the masses must count every query of the prompt (slower prefill, no prefix reuse)."""
    needs_reconstruction: ClassVar[bool] = False
    """Whether the model must have repeated the text before (``LayerView.reconstruction``): a pass that takes as long as
    the prompt, or longer."""
    evicts_while_prefilling: ClassVar[bool] = False
    """Whether it is called while the prompt is computed too, at each :meth:`next_eviction` (no prefix reuse). Its
    ``LayerView.queries`` are those of a catalyst prompt where the model has words for one."""

    alike: ClassVar[bool] = False
    """Whether it keeps the same tokens in every head of every layer, by their positions alone."""
    merges: ClassVar[bool] = False
    """Whether what it evicts is merged into what stays, by :meth:`merge`."""

    def budget(self, seen: int) -> int:
        """Tokens each head keeps out of ``seen``."""
        raise NotImplementedError

    def next_eviction(self, seen: int) -> int:
        """If it ``evicts_while_prefilling``: after how many tokens, more than ``seen``, that is; whole blocks."""
        raise NotImplementedError

    def protected(self, seen: int) -> tuple[int, int]:
        """Tokens kept whatever their score: how many of the first positions, how many of the last (32 or more).

        Of a stage that does not say: the last block.
        """
        return 0, BLOCK_TOKENS

    def score(self, layer: LayerView) -> torch.Tensor:
        """Importance of each token, float [H, T]; higher stays."""
        raise NotImplementedError

    def merge(
        self, layer: LayerView, evicted: torch.Tensor, into: torch.Tensor, threshold: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """If it ``merges``: what the tokens that stay hold from now on.

        Args:
            layer: its tokens, those that go included.
            evicted: bool [H, T] those that go now.
            into: bool [H, T] those that stay and may change; no others' results are looked at.
            threshold: float32 [H] what it returned at the request's last eviction; NaN at the first one.

        Returns:
            K and V, each float32 [H, T, D], and what it is to be given next time, float32 [H].
        """
        raise NotImplementedError

    @property
    def rule(self) -> str:
        """How what is kept beyond the protected tokens is shared out, one of ``workers.stages.budgets.RULES``.

        Or ``PER_HEAD``: then :meth:`head_budget` or :meth:`head_budget_of` says how many tokens each head keeps, and
        :meth:`budget` the most.
        """
        return str(getattr(self, "budgets", UNIFORM))

    def head_budget(self, seen: int, profile: LayerProfile | None) -> torch.Tensor | None:
        """Tokens each KV head of a layer keeps out of ``seen``, protected ones included: int64 [H].

        None: what the model is does not tell, only the text.
        """
        return None

    def head_budget_of(self, layer: LayerView) -> torch.Tensor:
        """The same of tokens that are there.

        Raises:
            NotImplementedError: a stage with the rule ``PER_HEAD`` that has neither method.
        """
        budget = self.head_budget(layer.seen, layer.profile)
        if budget is None:
            raise NotImplementedError(f"stage {self.name!r} does not say how many tokens each head keeps")
        return budget


@dataclass(frozen=True)
class Share(Evictor):
    """An evictor that keeps a share of all tokens seen."""

    keep: float = parameter(0.5, Bounds(above=0, most=1), "share of all tokens seen")

    def budget(self, seen: int) -> int:
        """The share ``keep`` of all tokens seen, at least two blocks."""
        return max(2 * BLOCK_TOKENS, math.ceil(self.keep * seen))


@dataclass(frozen=True)
class Fixed(Evictor):
    """An evictor whose cache does not grow: each head keeps so many tokens."""

    size: int = parameter(512, Bounds(least=2 * BLOCK_TOKENS), "tokens")

    def budget(self, seen: int) -> int:
        """``size``."""
        return self.size


@dataclass(frozen=True)
class Codec(Lossy):
    """Chooses how full blocks are stored, all but those that hold one of the last 32 tokens."""

    kind: ClassVar[Kind] = Kind.COMPRESS

    @property
    def format(self) -> BlockFormat:
        """The format of older blocks."""
        raise NotImplementedError

    def by_age(self) -> Ages:
        """The formats of blocks with so many younger tokens behind them, or more, in rising order, 32 at least."""
        return ((BLOCK_TOKENS, self.format),)

    def ages(self, layer: LayerPlace) -> Ages:
        """The same for one layer, where they differ; :meth:`by_age` then has all formats there are."""
        return self.by_age()

    def largest(self, shape: CacheShape) -> BlockFormat:
        """Of its formats the one that takes most."""
        return max((fmt for _, fmt in self.by_age()), key=shape.block_bytes)


@dataclass(frozen=True)
class BlockPlaces:
    """Whose blocks some are: N blocks of 32 tokens of one KV head each; all on one device."""

    shape: CacheShape
    layer: torch.Tensor  # int64 [N]
    head: torch.Tensor  # int64 [N] KV head
    position: torch.Tensor  # int64 [N, 32] original positions; 0 for tokens that nobody asks for
    profile: ModelProfile | None = field(default=None, kw_only=True)
    """The model's. It is there, with all that the stage ``needs``, if that is any."""
    partners: Callable[[], tuple[torch.Tensor, torch.Tensor]] | None = field(default=None, kw_only=True)
    """K and V of the same tokens in the layer of the codec's ``partner``, float32 [N, 32, D]: to encode, exact or as
    exact as there is; else as they are stored. It is there if the codec has a partner."""

    @property
    def the_profile(self) -> ModelProfile:
        """The profile that is there."""
        assert self.profile is not None
        return self.profile

    @property
    def the_partners(self) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
        """Those that are there."""
        assert self.partners is not None
        return self.partners


@dataclass(frozen=True)
class BlockBatch(BlockPlaces):
    """What a codec may look at to encode N full blocks."""

    k: torch.Tensor  # float32 [N, 32, D] exact, or as exact as there is
    v: torch.Tensor  # float32 [N, 32, D]
    mass: torch.Tensor  # float32 [N, 32] attention received since the token was kept track of
    votes: torch.Tensor  # float32 [N, 32] attention received from about the last 64 queries
    seen: int  # tokens of the request so far
    queries: Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]
    """Of a layer the last queries, at most so many: float32 [query heads, n, D] and their positions [n], rising."""

    def queries_of_blocks(self, last: int) -> torch.Tensor:
        """The last queries, at most ``last``, of the query heads that read each block: float32 [N, G, n, D]."""
        heads, group, dim = self.shape.kv_heads, self.shape.queries_per_kv_head, self.shape.head_dim
        layers, place = torch.unique(self.layer, return_inverse=True)
        of_layer = [self.queries(layer, last)[0].view(heads, group, -1, dim) for layer in layers.tolist()]
        return torch.stack(of_layer)[place, self.head]


@dataclass(frozen=True)
class CodedBlocks(BlockPlaces):
    """Encoded blocks of one layer, which queries are to read."""

    codes: Callable[[], torch.Tensor]
    """Their bytes, uint8 [N, nbytes], copied together."""
    memory: torch.Tensor | None
    """int64 [N] where each begins in RAM; None where not all are there."""


@dataclass(frozen=True)
class Coded(Codec):
    """A codec that kernels know nothing of: it encodes blocks, decodes them and attends over them itself.

    What it does with a block may depend on that block, on what :class:`BlockBatch` says of it, and on nothing else:
    blocks are built in batches of any size.
    """

    partner: ClassVar[int] = 0
    """How many layers on the one is whose block in the same place its blocks are made with, by the codec that has the
    opposite partner: both are of the same tokens, are built together, and go together. 0: none."""
    plain: ClassVar[Format | None] = None
    """The kernels' format that its blocks are laid out in, if any. Kernels read them by it where they pass through the
    host from disk, and in files they are packed."""

    @property
    def format(self) -> CodedFormat:
        """Its own."""
        return coded_format(self)

    def nbytes(self, shape: CacheShape) -> int:
        """Bytes of one block of 32 tokens of one KV head."""
        raise NotImplementedError

    def encode(self, blocks: BlockBatch) -> torch.Tensor:
        """The blocks' bytes, uint8 [N, nbytes]."""
        raise NotImplementedError

    def decode(self, codes: torch.Tensor, blocks: BlockPlaces) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V, float32 [N, 32, D], of what :meth:`encode` made."""
        raise NotImplementedError

    def attend(self, q: torch.Tensor, blocks: CodedBlocks, scaling: float) -> Attended:
        """Attention of queries q, float32 [H, G, D], over blocks of their layer.

        This decodes all of them first; a codec overrides it where it can work on its codes.
        """
        k, v = self.decode(blocks.codes(), blocks)
        score = q[blocks.head] @ k.mT * scaling  # [N, G, 32]
        return attend_blocks(score, blocks.head, len(q), lambda powers: powers @ v)


@dataclass(frozen=True)
class Placer(Stage):
    """Chooses which blocks live off the device, on one other tier, and maybe which ones a query reads
    (``workers.stages.selecting``)."""

    kind: ClassVar[Kind] = Kind.OFFLOAD
    tier: ClassVar[Tier] = Tier.HOST
    near: ClassVar[bool] = False
    """Whether the processor beside the tier attends to what is there."""
    selects: ClassVar[bool] = False
    """Whether queries read only some blocks."""
    fetches: ClassVar[bool] = False
    """Whether blocks on the host come to the device for their layer's part of each step, instead of being read there:
    two layers' worth of them, one read and one on its way (``workers.cache.staging``)."""

    @property
    def loss_class(self) -> LossClass:
        """Exact: what is moved is read as it was. One that selects is recoverable: what a query skips stays."""
        return LossClass.RECOVERABLE if self.selects else LossClass.EXACT

    def device_tokens(self) -> int | None:
        """How many of a head's last tokens stay on the device; blocks wholly older go to ``tier``. None: all stay."""
        raise NotImplementedError

    def with_device_tokens(self, recent: int, seen: int) -> Placer | None:
        """The same with about so many of a head's last tokens on the device, out of ``seen``, or fewer.

        None: it has no say in it, and under pressure ``host`` takes its place.
        """
        return None

    def places(self, layer: LayerPlace) -> Places:
        """The tiers of one layer's older blocks, where layers differ or there are several; from
        :meth:`device_tokens` on, or later."""
        stays = self.device_tokens()
        return () if stays is None else ((stays, self.tier),)

    def ages(self, layer: LayerPlace) -> Ages:
        """The formats of older blocks where the pipeline has no codec."""
        return ()

    def largest(self, shape: CacheShape) -> BlockFormat:
        """Of these formats the one that takes most."""
        return Format.RAW

    def recomputed(self) -> float:
        """If it ``fetches``: the share of a layer's raw blocks on the host that are not copied, but made again on the
        device from what the layer was given, as far as that was noted (``workers.cache.inputs``)."""
        return 0.0

    def lent_layers(self) -> int:
        """How many of the model's layers lend their memory to the device tier while it is in force, or more."""
        return 0


@dataclass(frozen=True)
class Full(Stage):
    """Everything raw on the device."""

    name: ClassVar[str] = "full"
    kind: ClassVar[Kind] = Kind.FULL
    summary: ClassVar[str] = "Every token, raw, on the device: the yardstick."

    @property
    def loss_class(self) -> LossClass:
        """Exact."""
        return LossClass.EXACT


@dataclass(frozen=True)
class Pipeline:
    """The stages of one request. Build with :func:`workers.stages.registry.build`."""

    stages: tuple[Stage, ...] = (Full(),)

    @property
    def text(self) -> str:
        """Pipeline text that builds an equal pipeline."""
        return format_pipeline(tuple(stage.spec() for stage in self.stages))

    @property
    def loss_class(self) -> LossClass:
        """The weakest class of the stages."""
        return max((stage.loss_class for stage in self._inexact), key=lambda loss: loss.value, default=LossClass.EXACT)

    @property
    def _inexact(self) -> tuple[Stage, ...]:
        """The stages that make a difference to logits: a placer that would round does not where a codec has, nor one
        that would make blocks again where it cannot."""
        rounds_codes = bool(self.codec) and isinstance(self.placer, Lossy)
        remakes = bool(self.placer and self.placer.recomputed())
        idle = self.placer if rounds_codes or (remakes and not self.recomputed) else None
        return tuple(stage for stage in self.stages if stage.loss_class is not LossClass.EXACT and stage is not idle)

    @property
    def evictor(self) -> Evictor | None:
        """Its evict stage, if any."""
        return next((stage for stage in self.stages if isinstance(stage, Evictor)), None)

    @property
    def codec(self) -> Codec | None:
        """Its compress stage, if any."""
        return next((stage for stage in self.stages if isinstance(stage, Codec)), None)

    @property
    def placer(self) -> Placer | None:
        """Its offload stage, if any."""
        return next((stage for stage in self.stages if isinstance(stage, Placer)), None)

    @property
    def is_full(self) -> bool:
        """Whether every block stays raw on the device."""
        return not (self.evictor or self.codec or self.placer)

    @property
    def logits_key(self) -> Pipeline:
        """Equal for pipelines with the same logits: it leaves out exact stages, and whether there is a shadow."""
        return Pipeline(tuple(stage.without_shadow() for stage in self._inexact) or (Full(),))

    @property
    def wants_shadow(self) -> bool:
        """Whether what it loses is to be kept exactly on the host tier. What is only read otherwise is not lost."""
        return self.loss_class is LossClass.RECOVERABLE and any(isinstance(stage, Lossy) for stage in self._inexact)

    @property
    def near(self) -> bool:
        """Whether blocks are attended to beside their memory, which rounds otherwise."""
        return self.placer is not None and self.placer.near

    @property
    def selects(self) -> bool:
        """Whether queries read only some blocks."""
        return self.placer is not None and self.placer.selects

    @property
    def fetches(self) -> bool:
        """Whether blocks on the host come to the device layer by layer."""
        return self.placer is not None and self.placer.fetches

    @property
    def recomputed(self) -> float:
        """The share of a layer's blocks on the host that are to be made again, not copied: none of what a codec or an
        evictor has made other blocks of."""
        return self.placer.recomputed() if self.placer and not (self.codec or self.evictor) else 0.0

    @property
    def reads_otherwise(self) -> bool:
        """Whether queries read less than what is stored, or something that may be rounded otherwise."""
        return self.near or self.selects or self.recomputed > 0

    @property
    def lent_layers(self) -> int:
        """How many of the model's layers lend their memory while it is in force, or more."""
        return self.placer.lent_layers() if self.placer else 0

    @property
    def moves_nothing(self) -> bool:
        """Whether every block stays raw on the device, read or not."""
        return not (self.evictor or self.codec or (self.placer and self.placer.device_tokens() is not None))

    def without_shadow(self) -> Pipeline:
        """The same without an exact copy of what it loses."""
        return Pipeline(tuple(stage.without_shadow() for stage in self.stages))
