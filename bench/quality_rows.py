"""The rows of the quality report, and what is counted until there is one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

import torch

from bench.quality_lab import Bytes, Compared
from bench.quality_subjects import LeftOut, Subject
from kernels.layout import CacheShape, Format
from workers.expected import expected_use
from workers.stages.base import Pipeline

_DIGITS = 5


class Table(Enum):
    """What is measured; the values are the rows' ``table``."""

    TEXT = "text"
    RETRIEVAL = "retrieval"
    CONVERSATION = "conversation"
    GENERATION = "generation"


@dataclass(frozen=True)
class Row:
    """One pipeline in one table, with one length and question known or not. None: not measured.

    Attributes:
        table: see Table.
        name: of the stage, recipe or combination.
        label: the same, told apart from its other rows.
        kind: evict, compress, offload, ..., recipe or combination.
        target: the share of the bytes that it was set to; None: it has its own.
        pipeline: its text. It is measured without an exact copy of what it loses.
        context: tokens of the prompt; of conversations and generations, all of them.
        query_aware: whether what is asked was in the prompt when the pipeline took effect.
        loss_class: of the pipeline as its text has it, that is, with the exact copy if that is its default.
        bytes_fraction: device bytes, of the full cache's: at the end of the prompt; of conversations and generations
            the most at any time, of the full cache's at the end. As if raw blocks were of 16 bits, tables included.
        host_fraction: the same of lower tiers.
        shadow_fraction: the same of an exact copy, which the pipeline's text asks for and the measurement did without.
        divergence: nats per token from the full cache's distribution: of the following tokens, or the answers'.
        divergence_last_quarter: the same over the last quarter of each generation.
        perplexity: of the same tokens.
        perplexity_full: the full cache's.
        needle_accuracy: share of questions that greedy decoding answers to the letter.
        agreement: share of tokens with the full cache's most probable one.
        samples: texts, questions or generations measured.
        seconds: what it took.
        left_out: why there is nothing to measure.
        error: what it raised instead.
    """

    table: str
    name: str
    label: str
    kind: str
    target: float | None
    pipeline: str | None
    context: int
    query_aware: bool
    loss_class: str | None
    bytes_fraction: float | None
    host_fraction: float | None
    shadow_fraction: float | None
    divergence: float | None
    divergence_last_quarter: float | None
    perplexity: float | None
    perplexity_full: float | None
    needle_accuracy: float | None
    agreement: float | None
    samples: int
    seconds: float
    left_out: str | None = None
    error: str | None = None

    def document(self) -> dict[str, Any]:
        """The row as JSON has it: figures rounded to five significant digits."""
        return {name: _rounded(value) for name, value in asdict(self).items()}


@dataclass
class Tally:
    """What becomes a row."""

    table: Table
    subject: Subject
    context: int
    query_aware: bool
    pipeline: Pipeline | None
    left_out: str | None
    error: str | None = None
    seconds: float = 0.0
    found: list[Compared] = field(default_factory=list)
    used: list[Bytes] = field(default_factory=list)

    @property
    def live(self) -> bool:
        """Whether there is something to measure."""
        return self.pipeline is not None and self.error is None

    def note(self, used: Bytes, found: Sequence[Compared]) -> None:
        """Takes in what a sample showed."""
        self.used.append(used)
        self.found += found

    def fail(self, error: Exception) -> None:
        """What it raised goes into the row, in place of figures."""
        self.error = f"{type(error).__name__}: {error}"

    def row(self, full: Tally, shape: CacheShape) -> Row:
        """The row, beside the full cache's tally."""
        measured = bool(self.found) and self.error is None
        built = self.pipeline
        asks = self.table in (Table.RETRIEVAL, Table.CONVERSATION)
        last = (
            torch.cat([one.divergence[-max(1, len(one.divergence) // 4) :] for one in self.found]) if measured else None
        )
        return Row(
            table=self.table.value,
            name=self.subject.name,
            label=self.subject.label,
            kind=self.subject.kind,
            target=self.subject.target,
            pipeline=built.text if built else None,
            context=self.context,
            query_aware=self.query_aware,
            loss_class=built.loss_class.name.lower() if built else None,
            bytes_fraction=self._share("device") if measured else None,
            host_fraction=self._share("elsewhere") if measured else None,
            shadow_fraction=_shadow_fraction(built, shape, self.context) if built else None,
            divergence=self._mean("divergence") if measured else None,
            divergence_last_quarter=float(last.mean()) if last is not None and self.table is Table.GENERATION else None,
            perplexity=self.perplexity if measured else None,
            perplexity_full=full.perplexity,
            needle_accuracy=self._accuracy() if measured and asks else None,
            agreement=self._mean("agreement") if measured else None,
            samples=len(self.found) if measured else 0,
            seconds=self.seconds,
            left_out=self.left_out,
            error=self.error,
        )

    @property
    def perplexity(self) -> float | None:
        """exp of the mean loss over all tokens; None where nothing was measured."""
        return float(torch.cat([one.loss for one in self.found]).mean().exp()) if self.found else None

    def _mean(self, name: str) -> float:
        return float(torch.cat([getattr(one, name).float() for one in self.found]).mean())

    def _accuracy(self) -> float:
        return sum(bool(one.hit.all()) for one in self.found) / len(self.found)

    def _share(self, where: str) -> float:
        taken: int = sum(getattr(one, where) for one in self.used)
        return taken / sum(one.full for one in self.used)


def _shadow_fraction(pipeline: Pipeline, shape: CacheShape, tokens: int) -> float:
    use = expected_use(pipeline, shape, tokens)
    shadow_bytes = use.shadow_bytes / shape.block_bytes(Format.RAW) * shape.block_bytes_16bit(Format.RAW)
    return shadow_bytes / use.full_bytes_16bit


def tallies(
    table: Table, subjects: Sequence[Subject], tokens: int, context: int, query_aware: bool = False
) -> list[Tally]:
    """One for each subject, set up for ``tokens`` tokens."""
    made = []
    for subject in subjects:
        pipeline = left_out = None
        try:
            pipeline = subject.make(tokens)
        except LeftOut as why:
            left_out = str(why)
        made.append(Tally(table, subject, context, query_aware, pipeline, left_out))
    return made


def _rounded(value: Any) -> Any:
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value
