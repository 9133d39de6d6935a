"""The commands against a real controller, a real job store and an engine that makes tokens by a rule."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from controller.server import ControllerServer
from controller.settings import ControllerSettings
from kvpilot.v1 import generation_pb2
from tests.engines import MODEL, ScriptedEngine, scripted_text, scripted_tokens
from tests.jobs_help import connected, working

pytestmark = pytest.mark.anyio
TIMEOUT_S = 60.0
PROGRAM = "from cli.main import app; app()"


@dataclass
class Serving:
    """A front door with a worker behind it."""

    endpoint: str
    engine: ScriptedEngine


@pytest.fixture
async def serving(redis_url: str) -> AsyncIterator[Serving]:
    engine = ScriptedEngine()
    async with connected(redis_url) as bus, connected(redis_url) as workers_bus:
        server = ControllerServer(ControllerSettings(listen="127.0.0.1:0"), bus)
        endpoint = await server.start()
        async with working(workers_bus, engine, "scripted"):
            async with asyncio.timeout(TIMEOUT_S):
                while not await bus.cards():
                    await asyncio.sleep(0.01)
            yield Serving(endpoint, engine)
        await server.stop(0)


async def start(*words: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        PROGRAM,
        *words,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def run(*words: str, stdin: bytes = b"") -> tuple[int | None, str, str]:
    process = await start(*words)
    async with asyncio.timeout(TIMEOUT_S):
        out, err = await process.communicate(stdin)
    return process.returncode, out.decode(), err.decode()


async def test_generate_streams_text_and_sums_up_on_stderr(serving: Serving) -> None:
    code, out, err = await run("generate", "hello", "--max-tokens", "4", "-e", serving.endpoint)
    assert (code, out) == (0, scripted_text(scripted_tokens("hello", 4)) + "\n")
    assert "[length] 5 + 4 tokens" in err


async def test_prompt_comes_from_a_file_or_stdin_as_it_is(serving: Serving, tmp_path: Path) -> None:
    text = "two\nlines, ünïcode\n"
    wanted = scripted_text(scripted_tokens(text, 3)) + "\n"
    (tmp_path / "prompt.txt").write_text(text, encoding="utf-8")
    options = ("--max-tokens", "3", "-q", "-e", serving.endpoint)
    assert await run("generate", "-f", str(tmp_path / "prompt.txt"), *options) == (0, wanted, "")
    assert await run("generate", *options, stdin=text.encode()) == (0, wanted, "")
    code, out, err = await run("generate", *options, stdin=b"bad \xff")
    assert (code, out) == (2, "")
    assert "stdin: not UTF-8: byte 0xff at offset 4" in err


async def test_json_is_one_document(serving: Serving) -> None:
    words = ("generate", "hello", "--max-tokens", "3", "--seed", "5", "--pipeline", "snapkv(keep=0.5)", "--json")
    code, out, err = await run(*words, "-e", serving.endpoint)
    assert (code, err) == (0, "")
    document = json.loads(out)
    ids = scripted_tokens("hello", 3)
    assert document["token_ids"] == ids
    assert document["text"] == scripted_text(ids)
    assert document["logprobs"][0] == {
        "token_id": ids[0],
        "logprob": -0.5,
        "top": [{"token_id": ids[0], "logprob": -0.5}],
    }
    assert document["seed"] == 5
    assert document["finish_reason"] == "length"
    assert document["usage"] == {
        "prompt_tokens": 5,
        "reused_prompt_tokens": 0,
        "generated_tokens": 3,
        "preemptions": 0,
    }
    assert document["cache"]["full_cache_bytes"] == 0
    assert document["switches"] == []


async def test_refusal_names_every_bad_field_and_exits_with_2(serving: Serving) -> None:
    words = ("generate", "", "--temperature", "-1", "--pipeline", "snapkv(keep=0.5) | nonsense", "--max-tokens", "0")
    code, out, err = await run(*words, "-e", serving.endpoint)
    assert (code, out) == (2, "")
    for field in ("prompt", "sampling.temperature", "sampling.max_tokens", "pipeline"):
        assert f"\n  {field}: " in err, err
    assert "Traceback" not in err


async def test_unknown_model_is_refused(serving: Serving) -> None:
    code, _, err = await run("generate", "hello", "--model", "other", "-e", serving.endpoint)
    assert code == 2
    assert "\n  model: " in err
    assert MODEL in err


async def test_interrupted_generate_cancels_its_job(serving: Serving) -> None:
    serving.engine.steps = 2
    process = await start("generate", "hello", "--max-tokens", "50", "-e", serving.endpoint)
    assert process.stdout is not None
    async with asyncio.timeout(TIMEOUT_S):
        first = await process.stdout.readexactly(2)
        process.send_signal(signal.SIGINT)
        await process.wait()
        while serving.engine.live_jobs():
            await asyncio.sleep(0.01)
    assert first == scripted_text(scripted_tokens("hello", 1))[:2].encode()
    assert process.returncode == 130


async def test_chat_sends_the_whole_talk_in_one_session(serving: Serving) -> None:
    talk = b"/pipeline snapkv(keep=0.5)\nfirst\n/pipeline nonsense(\nsecond\n/what\n/quit\nnever\n"
    code, out, err = await run("chat", "--max-tokens", "2", "-e", serving.endpoint, stdin=talk)
    answer = scripted_text(scripted_tokens("user: first", 2))
    again = scripted_text(scripted_tokens(f"user: first\nassistant: {answer}\nuser: second", 2))
    assert (code, out) == (0, f"{answer}\n{again}\n")
    assert "from the next turn on: snapkv(keep=0.5)" in err
    assert "expected" in err
    assert "unknown command /what" in err


async def test_mode_is_shown_and_set(serving: Serving) -> None:
    assert await run("mode", "-e", serving.endpoint) == (0, "active\n", "")
    assert await run("mode", "advisory", "-e", serving.endpoint) == (0, "active -> advisory\n", "")
    assert await run("mode", "-e", serving.endpoint) == (0, "advisory\n", "")


async def test_top_prints_once(serving: Serving) -> None:
    code, out, _ = await run("top", "--once", "-e", serving.endpoint)
    assert code == 0
    assert "mode active" in out
    code, _, err = await run("top", "-e", serving.endpoint)
    assert code == 2
    assert "kvpilot top --once" in err


async def test_override_of_a_request_that_is_not_there(serving: Serving) -> None:
    code, _, err = await run("override", "job-1", "full", "-e", serving.endpoint)
    assert code == 2
    assert "no live request's id ends with 'job-1'; live: none" in err


async def test_job_failing_midway_keeps_what_came_before(serving: Serving) -> None:
    serving.engine.breaks_on = "broken"
    code, out, err = await run("generate", "broken", "--json", "-e", serving.endpoint)
    assert code == 1
    assert "Traceback" not in err
    assert out == "" or json.loads(out)["finish_reason"] == generation_pb2.FinishReason.Name(5)[14:].lower()
