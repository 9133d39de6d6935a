"""A dataset as arrays: what training, calibration and evaluation look at."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from models import dataset
from models.features import F64, NAMES, Family
from models.forest import STATE_FEATURES
from models.scale import log_divergence

Text: TypeAlias = npt.NDArray[np.str_]
Mask: TypeAlias = npt.NDArray[np.bool_]
Index: TypeAlias = npt.NDArray[np.intp]

EVICTING = (Family.WINDOW, Family.SCORED, Family.WINDOW_QUANTISE, Family.SCORED_QUANTISE)
NEEDED_NATS = 0.05
"""A window whose local pipeline loses more than this needed what lies further back."""
LOCAL_TOKENS = 256
"""The local pipeline is the window whose ``recent`` is nearest to this."""

_DROPPED, _CODED, _RECENT, _HOST = (
    NAMES.index(name) for name in ("log2_dropped", "coded_share", "log2_recent", "host_share")
)


@dataclass(frozen=True)
class Examples:
    """N rows of a dataset: one place in a text and one candidate pipeline each."""

    rows: F64
    """[N, features]"""
    divergence: F64
    """[N] nats per token"""
    document: Text
    kind: Text
    pipeline: Text
    family: Text
    model: Text
    at_token: npt.NDArray[np.int64]
    measured_under: Text
    bytes_share: F64
    """[N] device bytes over those of a full cache, both with raw blocks in 16 bits."""

    @classmethod
    def of(cls, table: pa.Table) -> Examples:
        """The rows of a dataset."""

        def text(name: str) -> Text:
            return np.array(table[name].to_pylist(), dtype=np.str_)

        return cls(
            rows=dataset.features(table),
            divergence=table["divergence"].to_numpy(),
            document=text("document"),
            kind=text("kind"),
            pipeline=text("pipeline"),
            family=text("family"),
            model=text("model"),
            at_token=table["at_token"].to_numpy().astype(np.int64),
            measured_under=text("measured_under"),
            bytes_share=table["device_bytes_16bit"].to_numpy() / table["full_cache_bytes_16bit"].to_numpy(),
        )

    @classmethod
    def joined(cls, *parts: Examples) -> Examples:
        """The rows of all parts, one after the other."""
        return cls(
            **{name: np.concatenate([getattr(part, name) for part in parts]) for name in cls.__dataclass_fields__}
        )

    def __len__(self) -> int:
        return len(self.divergence)

    def take(self, which: Mask | Index) -> Examples:
        """Some of the rows."""
        fields: dict[str, Any] = {name: getattr(self, name)[which] for name in self.__dataclass_fields__}
        return replace(self, **fields)

    @cached_property
    def target(self) -> F64:
        """[N] log nats; what divergences below the floor count as is in :data:`models.features.AUDIT_FLOOR`."""
        return log_divergence(self.divergence)

    @cached_property
    def families(self) -> list[Family]:
        """[N]"""
        return [Family(name) for name in self.family.tolist()]

    @cached_property
    def exact(self) -> Mask:
        """[N] rows that lose nothing by definition: nothing is learned from them, nothing measured on them."""
        return np.asarray(self.family == Family.EXACT.value)

    @cached_property
    def lossy(self) -> Mask:
        """[N] rows that lose something at their length.

        A window longer than the text so far, say, keeps everything: counting it would flatter every metric.
        Unknown stages (NaN) count as lossy.
        """
        keeps_all: Mask = (self.rows[:, _DROPPED] == 0) & (self.rows[:, _CODED] == 0)
        return ~self.exact & ~keeps_all

    @cached_property
    def evicting(self) -> Mask:
        """[N] rows of pipelines that evict, where they do."""
        dropping: Mask = self.rows[:, _DROPPED] > 0
        evicts: Mask = np.isin(self.family, [family.value for family in EVICTING])
        return evicts & dropping

    @cached_property
    def on_device(self) -> Mask:
        """[N] rows of pipelines that keep nothing on the host to be read there, at any length: their device bytes can
        be compared."""
        offloading = np.unique(self.pipeline[self.rows[:, _HOST] > 0])
        return ~np.isin(self.pipeline, offloading)

    @cached_property
    def window(self) -> Index:
        """[N] number of the place that a row belongs to: its document, token, model, and how it was measured."""
        keys = [self.document, self.model, self.measured_under, self.at_token]
        number = np.zeros(len(self), np.intp)
        for key in keys:
            _, code = np.unique(key, return_inverse=True)
            _, number = np.unique(number * (int(code.max(initial=0)) + 1) + code, return_inverse=True)
        return number

    @cached_property
    def windows(self) -> int:
        """How many places there are."""
        return int(self.window.max(initial=-1)) + 1

    @cached_property
    def source(self) -> Text:
        """[N] what is never divided: a document, or the one that a task's text comes from."""
        names, inverse = np.unique(self.document, return_inverse=True)
        return np.array([dataset.source_of(str(name)) for name in names], dtype=np.str_)[inverse]

    @property
    def documents(self) -> int:
        """How many documents there are, those of one source counted once."""
        return len(np.unique(self.source))


@dataclass(frozen=True)
class LongRange:
    """Windows whose local pipeline was measured: whether it lost too much."""

    states: F64
    """[W, request and signal features]"""
    needed: Mask
    """[W]"""
    document: Text
    """[W]"""

    @classmethod
    def of(cls, examples: Examples) -> LongRange:
        """One row per place where a pure window was measured."""
        candidates = np.flatnonzero(examples.family == Family.WINDOW.value)
        distance = np.abs(examples.rows[candidates, _RECENT] - np.log2(LOCAL_TOKENS))
        candidates = candidates[np.lexsort((distance, examples.window[candidates]))]
        _, first = np.unique(examples.window[candidates], return_index=True)
        chosen = candidates[first]
        return cls(
            states=examples.rows[chosen, :STATE_FEATURES],
            needed=examples.divergence[chosen] > NEEDED_NATS,
            document=examples.document[chosen],
        )
