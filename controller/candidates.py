"""What the learned planner chooses from: the pipelines of :mod:`models.candidates` that a worker knows, as columns that
are the same for all of its requests; and, for SCENARIO_EDGE alone, a few without shadows.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvpilot.catalog import PipelineKey, StageCatalog
from models.candidates import CANDIDATES
from models.features import Family, family_of

EDGE_PIPELINES: tuple[str, ...] = (
    "kivi(bits=4, shadow=false)",
    "snapkv(keep=0.5, shadow=false) | kivi(bits=4, shadow=false)",
)
"""Host memory is short there too: what these lose stays lost."""


class CandidateTable:
    """The candidates that one worker knows."""

    def __init__(self, catalog: StageCatalog) -> None:
        self._catalog = catalog
        self.pipelines = tuple(text for text in (*CANDIDATES, *EDGE_PIPELINES) if catalog.knows(text))
        self.keys = tuple(catalog.key(text) for text in self.pipelines)
        self.families = tuple(family_of(key) for key in self.keys)
        self.exact: npt.NDArray[np.bool_] = np.array([family is Family.EXACT for family in self.families], bool)
        """[C]"""
        self.edge_only: npt.NDArray[np.bool_] = np.array([text in EDGE_PIPELINES for text in self.pipelines], bool)
        """[C]"""
        self._places = {_plain(key): place for place, key in enumerate(self.keys)}
        self._found: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self.pipelines)

    def place(self, pipeline: str) -> int:
        """The column of a pipeline, however it is spelled; one past the last for a pipeline off the list.

        Raises:
            PipelineError: the worker does not know it.
        """
        place = self._found.get(pipeline)
        if place is None:
            place = self._places.get(_plain(self._catalog.key(pipeline)), len(self))
            self._found[pipeline] = place
        return place


def _plain(key: PipelineKey) -> PipelineKey:
    """The key with ``int8`` spelled as what it is."""
    return tuple(("kivi", (("bits", 8), *given)) if name == "int8" else (name, given) for name, given in key)
