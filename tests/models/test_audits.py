"""Audited decisions as rows to learn from, from a real job store."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from kvpilot.request import make_request
from kvpilot.v1 import job_pb2, policy_pb2
from models import dataset
from models.collect.audits import read_audits
from models.collect.corpus import Skipped
from models.collect.folder import Folder
from models.collect.outcomes import read_outcomes
from models.collect.plan import Asked
from models.examples import Examples
from models.features import NAMES, SCHEMA_HASH
from tests.controller.serving import front_door
from tests.engines import MODEL, ScriptedEngine
from tests.jobs_help import working

pytestmark = pytest.mark.anyio

ROW = [math.log2(800), *np.linspace(0, 1, len(NAMES) - 2).tolist(), math.nan]


def decided(name: str, job_id: str, **changes: object) -> job_pb2.DecisionEvent:
    content = job_pb2.Decided(
        pipeline="kivi(bits=4)",
        from_pipeline="int8",
        bundle="b",
        family="quantise",
        features=ROW,
        feature_schema_hash=SCHEMA_HASH,
    )
    content.MergeFrom(job_pb2.Decided(**changes))
    return job_pb2.DecisionEvent(decision_id=name, request_id=job_id, worker="w", decided=content)


def measured(name: str, at_token: int, divergence: float, tokens: int = 32) -> job_pb2.DecisionEvent:
    audit = policy_pb2.Audit(
        at_token=at_token, divergence=divergence, divergence_max=1.0, top1_agreement=0.75, tokens=tokens
    )
    return job_pb2.DecisionEvent(decision_id=name, measured=job_pb2.Measured(audit=audit, bound=0.1))


async def test_audits_become_rows_of_their_requests(redis_url: str, tmp_path: Path) -> None:
    async with front_door(redis_url) as door, working(door.bus, ScriptedEngine(), "w1"):
        for session in ("s", ""):
            await door.generate(make_request("about rivers", max_tokens=20, session_id=session))
        jobs = [document async for document in read_outcomes(door.bus, MODEL, Skipped())]
        one, other = (document.name.partition("#")[2] for document in jobs)
        await door.bus.log_decisions(
            [
                decided("d1", one),
                decided("d2", one, bundle="c"),
                decided("d3", other),
                decided("no audit", one),
                decided("other schema", one, feature_schema_hash="f" * 16),
                decided("gone", "a job that has expired"),
                measured("d1", 40, 0.01),
                measured("d2", 300, 0.02),
                measured("d2", 560, 0.03),
                measured("d3", 40, 0.04),
                measured("d3", 90, math.inf),
                measured("d3", 190, 0.5, tokens=16),
                measured("other schema", 40, 0.9),
                measured("gone", 40, 0.9),
            ]
        )
        skipped = Skipped()
        found = dict([entry async for entry in read_audits(door.bus, MODEL, 32, skipped)])
        assert [entry async for entry in read_audits(door.bus, "another", 32, Skipped())] == []
    assert skipped.reasons == {
        "audits without features of this schema": 1,
        "audited jobs that have expired": 1,
        "audits that are no number": 1,
        "audits of other than 32 steps": 1,
    }
    assert {name.partition("#")[0] for name in found} == {document.name.partition("#")[0] for document in jobs}
    folder = Folder(tmp_path, Asked(MODEL, ("full",), 32))
    for _ in range(2):  # taken over again they are there once
        for name, rows in found.items():
            folder.write_served(name, rows)
    folder.write_manifest({}, {})
    examples = Examples.of(dataset.read(tmp_path))
    assert sorted(examples.divergence.tolist()) == [0.01, 0.02, 0.03, 0.04]
    assert set(examples.kind) == {"served"}
    assert set(zip(examples.pipeline, examples.measured_under, examples.family, strict=True)) == {
        ("kivi(bits=4)", "int8", "quantise")
    }
    assert set(examples.at_token) == {800}
    np.testing.assert_array_equal(examples.rows[0], np.array(ROW, np.float32).astype(np.float64))
    assert np.isnan(examples.bytes_share).all()
