"""What an engine's reports say of its requests."""

from __future__ import annotations

import numpy as np
import pytest

from kvpilot.v1 import generation_pb2, job_pb2, policy_pb2
from models.features import KEPT_SHARES
from tests.tiny import Drive, prompt, tiny_engine
from workers.signals import FAR_HORIZONS_TOKENS, prompt_statistics


def states_of(drive: Drive, name: str = "job") -> list[policy_pb2.RequestState]:
    return [state for report in drive.reports for state in report.requests if state.request_id == name]


def test_signals_cover_the_tokens_since_the_last_report() -> None:
    drive = Drive(tiny_engine(report_interval_tokens=16))
    drive.submit("job", prompt(301, 3), 64, top_logprobs=1, sampling={"temperature": 1.0, "seed": 3})
    tokens = drive.finish()["job"].tokens
    told, measured = 0, 0
    for state in states_of(drive):
        since, told = tokens[told : state.generated_tokens], state.generated_tokens
        if since:
            assert state.signals.surprise == pytest.approx(-np.mean([token.logprob for token in since]), rel=1e-5)
            assert state.signals.next_token_entropy_max >= state.signals.next_token_entropy > 0
        if state.signals.steps:
            measured += 1
            for name in ("far_mass", "far_mass_max", "far_mass_last", "far_mass_worst_layer"):
                assert len(getattr(state.signals, name)) == len(FAR_HORIZONS_TOKENS)
            assert state.signals.far_mass_max[0] >= state.signals.far_mass_worst_layer[0] >= state.signals.far_mass[0]
            assert state.signals.far_mass[0] > state.signals.far_mass[-1] == 0
    assert measured >= 3


def test_requests_that_decode_together_are_reported_together() -> None:
    drive = Drive(tiny_engine(report_interval_tokens=16))
    drive.submit("early", prompt(64, 3), 200)
    drive.until(lambda: drive.generated("early") >= 21)
    drive.submit("late", prompt(64, 5), 150)
    drive.finish()
    told = [
        {state.request_id: state.generated_tokens for state in report.requests}
        for report in drive.reports
        if any(state.request_id == "late" and 32 <= state.generated_tokens < 150 for state in report.requests)
    ]
    assert len(told) >= 6
    assert all(set(states) == {"early", "late"} for states in told)
    steps = np.diff([states["late"] for states in told])
    assert set(steps) == {16}


def test_votes_are_told_from_the_end_of_the_prompt_on() -> None:
    drive = Drive(tiny_engine(step_tokens=100))
    drive.submit("job", prompt(301, 3), 40)
    drive.finish()
    states = states_of(drive)
    assert states[0].prefilling
    assert list(states[0].signals.dropped_votes) == []
    for state in states:
        if not state.prefilling:
            dropped, most = state.signals.dropped_votes, state.signals.dropped_votes_max
            assert len(dropped) == len(most) == len(KEPT_SHARES)
            assert 1 > dropped[0] > dropped[1] > dropped[2] > 0
            assert all(largest >= mean for largest, mean in zip(most, dropped, strict=True))


def test_no_votes_are_dropped_where_fewer_tokens_are_kept() -> None:
    drive = Drive(tiny_engine())
    drive.submit("job", prompt(301, 3), 40, pipeline="snapkv(keep=0.4)")
    drive.finish()
    last = states_of(drive)[-1].signals.dropped_votes
    assert last[0] > last[1] > last[2] == 0


def test_reports_tell_what_the_prompt_looks_like() -> None:
    drive = Drive(tiny_engine())
    drive.submit("job", [*prompt(50, 3), *prompt(50, 3)], 40)
    messages = [("system", "Be brief."), ("user", "Why?"), ("assistant", "So."), ("user", "Why so?")]
    chat = generation_pb2.Chat(
        messages=[generation_pb2.Message(role=role, content=content) for role, content in messages]
    )
    request = generation_pb2.GenerateRequest(chat=chat, sampling=generation_pb2.Sampling(max_tokens=4))
    drive.engine.submit(job_pb2.Job(job_id="chat", request=request))
    drive.finish()
    for state in states_of(drive):
        assert state.prompt == prompt_statistics([*prompt(50, 3), *prompt(50, 3)])
        assert state.prompt.repeated_share > 0.45
    assert [state.prompt.turns for state in states_of(drive, "chat")][-1] == 2
