"""Rows of a dataset from what was served: decisions of a bundle, and what audits measured under them.

A bundle's row of the pipeline it chose, as it saw it, and the divergence that an audit found a few tokens later are an
example like any replayed one, at no cost. They come from the pipelines that were chosen alone: they sharpen what is
known of these, and are no substitute for replays, which measure all.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from typing import Any

from kvpilot.bus import Bus, JobNotFoundError
from models import dataset
from models.collect.corpus import Skipped
from models.collect.outcomes import source_of_request
from models.decisions import Decided, has_features, join
from models.features import NAMES

KIND = "served"


async def read_audits(
    bus: Bus, model: str, horizon_tokens: int, skipped: Skipped
) -> AsyncIterator[tuple[str, list[dict[str, Any]]]]:
    """Documents of the decision log's audited requests and their rows, with the columns of :mod:`models.dataset`.

    What only replays measure, losses, bytes and times, is NaN. A request has the source, and so the split, that it has
    as a document of ``models.collect.outcomes``.

    Args:
        bus: job store with the log; requests must still be in it.
        model: requests of others are left out.
        horizon_tokens: audits of another length are left out, since what they measure does not compare.
        skipped: takes the counts.

    Raises:
        BusUnavailableError: the store is out of reach.
    """
    by_request: dict[str, list[Decided]] = {}
    for decided in join(await bus.all_decisions()):
        if not decided.audits:
            continue
        if not has_features(decided.decided):
            skipped.add("audits without features of this schema")
            continue
        by_request.setdefault(decided.request_id, []).append(decided)
    for request_id, decisions in by_request.items():
        try:
            request = (await bus.record(request_id)).job.request
        except JobNotFoundError:
            skipped.add("audited jobs that have expired")
            continue
        if request.model != model:
            skipped.add("audited jobs of another model")
            continue
        name = f"job/{source_of_request(request)}#{request_id}/audits"
        rows = [row for decided in decisions for row in _rows(name, model, decided, horizon_tokens, skipped)]
        if rows:
            yield name, rows


def _rows(name: str, model: str, decided: Decided, horizon_tokens: int, skipped: Skipped) -> list[dict[str, Any]]:
    made = decided.decided
    features = dict(zip(NAMES, made.features, strict=True))
    rows = []
    for audit in decided.audits.values():
        if audit.tokens != horizon_tokens:
            skipped.add(f"audits of other than {horizon_tokens} steps")
            continue
        if not math.isfinite(audit.divergence):
            skipped.add("audits that are no number")
            continue
        rows.append(
            {
                **dict.fromkeys(dataset.MEASURES, math.nan),
                "document": name,
                "kind": KIND,
                "model": model,
                "pipeline": made.pipeline,
                "family": made.family,
                "measured_under": made.from_pipeline,
                "at_token": round(2 ** features["log2_seen"]),
                **features,
                "divergence": audit.divergence,
                "divergence_max": audit.divergence_max,
                "top1_agreement": audit.top1_agreement,
            }
        )
    return rows
