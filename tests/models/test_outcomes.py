"""Past jobs as documents, from a real job store."""

from __future__ import annotations

import pytest

from kvpilot.request import make_request
from models.collect.corpus import Skipped
from models.collect.outcomes import read_outcomes
from models.dataset import source_of
from tests.controller.serving import front_door
from tests.engines import MODEL, ScriptedEngine, scripted_tokens
from tests.jobs_help import working

pytestmark = pytest.mark.anyio


async def test_finished_jobs_are_read_with_what_they_generated(redis_url: str) -> None:
    async with front_door(redis_url) as door, working(door.bus, ScriptedEngine(), "w1"):
        for prompt, count in (("a question about rivers", 20), ("another one", 30), ("too short an answer", 4)):
            await door.generate(make_request(prompt, max_tokens=count))
        await door.generate(make_request(messages=[("user", "hi")], max_tokens=16, session_id="s1"))
        skipped = Skipped()
        found = [document async for document in read_outcomes(door.bus, MODEL, skipped)]
        others = Skipped()
        assert [document async for document in read_outcomes(door.bus, "other", others)] == []
    assert [document.text for document in found] == ["a question about rivers", "another one", ""]
    assert found[0].continuation == tuple(scripted_tokens("a question about rivers", 20))
    assert found[2].turns == (("user", "hi"),)
    assert source_of(found[2].name) == "job/session-s1"
    assert skipped.reasons == {"jobs with too few generated tokens": 1}
    assert others.reasons == {"jobs of another model": 4}
