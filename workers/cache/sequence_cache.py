"""One request's share of the cache, as the worker's cache keeps it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from kernels.api import F32
from kernels.layout import BlockFormat, Tier
from workers.cache.accounting import CacheUse
from workers.cache.arena import Lot
from workers.cache.arrangement import Merging
from workers.cache.coded import CodedReader
from workers.cache.inputs import LayerInputs
from workers.cache.prefix import PrefixRow
from workers.cache.preparation import Preparation
from workers.cache.reading import Reader
from workers.cache.recall import SelectiveReader
from workers.cache.recalls import Recalls
from workers.cache.shadow import Shadow
from workers.cache.staging import Staging


class Occasion(Enum):
    """Why a pipeline is applied: the prompt is complete, another one took over, or 32 more tokens have come."""

    PROMPT = "prompt"
    SWITCH = "switch"
    SETTLE = "settle"


@dataclass
class SequenceCache:
    """One request's share of the cache. Changed by the worker's cache only."""

    slot: int
    max_tokens: int
    seen: int = 0
    """Tokens stored so far, kept or not."""
    reserved: int = 0
    """Tokens that every table has room for, but that are not counted in yet."""
    evicted: bool = False
    """Whether its tables lack tokens."""
    lost: bool = False
    """Whether something was dropped or rounded for good."""
    exact_tokens: int | None = None
    """Tokens computed before the first lossy pipeline; None while all are."""
    shadow: Shadow | None = None
    lots: dict[tuple[Tier, BlockFormat], Lot] = field(default_factory=dict)
    prefix: list[PrefixRow] = field(default_factory=list)
    prompt_votes: F32 | None = None
    """[L, H, prompt tokens] votes while the prompt is computed, in full precision: a sum over several chunks, rounded
    as often, would depend on where the prompt is cut."""
    reconstruction: F32 | None = None
    """[L, H, positions] the most attention each of the first tokens received while the model repeated the text; None
    until then. Replaced, never changed: forks share it."""
    novelty: list[float] = field(default_factory=list)
    """[positions] surprise -log p of each token when it came, NaN where it was not noted, the rest likewise."""
    merging: Merging | None = None
    """What its tokens have taken up of evicted ones, since all were last as they had been computed. Replaced, never
    changed."""
    row_mass: F32 | None = None
    """[L, H, T] attention mass that the queries of the first T tokens pay, T being the prompt's whole rows."""
    peak: CacheUse = field(default_factory=CacheUse)
    preparation: Preparation | None = None
    """The switch that is being prepared."""
    origin: SequenceCache | None = None
    """The cache it is a fork of."""
    forks: int = 0
    """Open forks of it."""
    lent: list[Lot] = field(default_factory=list)
    """Its own lots, which its forks read."""
    readers: tuple[Reader, ...] = ()
    """What reads it in decode steps, beside or before the kernels."""
    coded: CodedReader | None = None
    """What reads its blocks that kernels do not know, after the readers."""
    areas: dict[Tier, Staging] = field(default_factory=dict)
    """Where its blocks pass through, by the tier that they live on."""
    inputs: LayerInputs | None = None
    """What its layers were given for keys and values; None: it is not noted."""
    recalls: Recalls = field(default_factory=Recalls)
    """What reading its blocks off the device has taken so far."""

    @property
    def damaged(self) -> bool:
        """Whether something of it is gone from the disk for good, so that its tokens must be computed again."""
        return self.staging is not None and self.staging.damaged

    @property
    def staging(self) -> Staging | None:
        """Where its blocks on disk pass through; None: it has none."""
        return self.areas.get(Tier.DISK)

    def note_surprises(self, position: int, surprises: Sequence[float]) -> None:
        """Notes the surprises of the tokens from ``position`` on, for evictors that go by novelty."""
        del self.novelty[position:]
        self.novelty.extend([float("nan")] * (position - len(self.novelty)))
        self.novelty.extend(surprises)

    @property
    def selective(self) -> SelectiveReader | None:
        """The one of its readers that has queries read only some blocks."""
        return next((reader for reader in self.readers if isinstance(reader, SelectiveReader)), None)
