"""The pipelines that the learned planner chooses from, and what each is: the same columns for all requests of a worker.

========  ==========================================  ==================================================================
column    pipelines                                   why
========  ==========================================  ==================================================================
exact     full; host(256)                             nothing is lost; the host if it is fast or the device full
codes     kivi 8; kivi 4; kivi 4 on the host          every token stays, in fewer bits
windows   1024, 512, 256 recent; 512 in 4 bits        for what looks at recent tokens only
scored    snapkv and h2o, half and a quarter;         for what looks at few tokens, wherever they are
          snapkv half and quarter, h2o quarter, 4 bit
edge      kivi 4 and snapkv half in 4 bits, without   for SCENARIO_EDGE alone, whose host memory is short too: what they
          shadow                                      lose stays lost
========  ==========================================  ==================================================================
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvpilot.catalog import PipelineKey, StageCatalog
from models.features import Family, family_of

PIPELINES: tuple[str, ...] = (
    "full",
    "host(recent=256)",
    "kivi(bits=8)",
    "kivi(bits=4)",
    "kivi(bits=4) | host(recent=256)",
    "window(sinks=4, recent=1024)",
    "window(sinks=4, recent=512)",
    "window(sinks=4, recent=256)",
    "window(sinks=4, recent=512) | kivi(bits=4)",
    "snapkv(keep=0.5)",
    "snapkv(keep=0.25)",
    "h2o(keep=0.5)",
    "h2o(keep=0.25)",
    "snapkv(keep=0.5) | kivi(bits=4)",
    "snapkv(keep=0.25) | kivi(bits=4)",
    "h2o(keep=0.25) | kivi(bits=4)",
)
EDGE_PIPELINES: tuple[str, ...] = (
    "kivi(bits=4, shadow=false)",
    "snapkv(keep=0.5, shadow=false) | kivi(bits=4, shadow=false)",
)


class CandidateTable:
    """The candidates that one worker knows."""

    def __init__(self, catalog: StageCatalog) -> None:
        self._catalog = catalog
        self.pipelines = tuple(text for text in (*PIPELINES, *EDGE_PIPELINES) if catalog.knows(text))
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
