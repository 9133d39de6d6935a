"""One trace from client through controller to worker, as a collector receives it: a real OTLP receiver over gRPC."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent import futures
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from cli import tether
from tests.e2e.serving import TIMEOUT_S, Running, operator_of, serving

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.timeout(4 * TIMEOUT_S),
    pytest.mark.skipif(not tether.SUPPORTED, reason="needs Linux"),
]
FORGOTTEN = "override dropped"
"""Said of a request that has ended: the controller knows its id alone by then."""
CLIENT = """
import json, sys
from kvpilot.client import Client
from kvpilot.tracing import configure_tracing

end = configure_tracing("application", "test")
target, prompt = sys.argv[1:]
with Client(target) as client:
    tokens = 0
    for event in client.generate(prompt, max_tokens=600, ignore_eos=True, temperature=0.5, seed=7, session_id="talk"):
        if event.kind == "accepted":
            print(event.message.accepted.job_id, flush=True)
        if event.kind == "tokens":
            tokens += len(event.message.tokens.tokens)
            if tokens == 40:
                print(tokens, flush=True)
                sys.stdin.readline()
end()
"""


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps the spans that come, each with the name of the service it came from."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Span]] = []
        self.news = threading.Event()

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802
        for resource in request.resource_spans:
            service = next(one.value.string_value for one in resource.resource.attributes if one.key == "service.name")
            self.spans += [(service, span) for scope in resource.scope_spans for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    def of(self, trace_id: bytes) -> dict[str, Span]:
        return {f"{service}: {span.name}": span for service, span in list(self.spans) if span.trace_id == trace_id}


@pytest.fixture(scope="module")
def collector() -> Iterator[tuple[Collector, str]]:
    collector = Collector()
    server = grpc.server(futures.ThreadPoolExecutor(4), options=(("grpc.so_reuseport", 0),))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield collector, f"http://127.0.0.1:{port}"
    server.stop(None)


@pytest.fixture(scope="module")
async def traced(
    anyio_backend: str,
    tiny_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
    collector: tuple[Collector, str],
) -> AsyncIterator[Running]:
    with pytest.MonkeyPatch.context() as patch:  # its processes have our environment
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector[1])
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        settings = {"mode": "off", "worker": {"log_format": "json"}, "controller": {"log_format": "json"}}
        async with serving(tiny_folder, tmp_path_factory.mktemp("traces"), **settings) as running:
            yield running


def attributes(span: Span) -> dict[str, Any]:
    found = {}
    for one in span.attributes:
        kind = one.value.WhichOneof("value")
        value = getattr(one.value, kind)
        found[one.key] = [each.string_value for each in value.values] if kind == "array_value" else value
    return found


def logged(traced: Running, process: str, job_id: str) -> list[dict[str, Any]]:
    """What a process has logged of a request that was live."""
    lines = [line for line in traced.logged(process) if line.get("request") == job_id]
    return [line for line in lines if not line["event"].startswith(FORGOTTEN)]


async def test_one_trace_from_client_to_worker(traced: Running, collector: tuple[Collector, str]) -> None:
    received, endpoint = collector
    door = "kvpilot-controller: kvpilot.v1.GenerationService/Generate"
    wanted = {
        *("application: text_completion", door, "kvpilot-controller: submit"),
        *(f"kvpilot-worker: {name}" for name in ("worker", "queue", "prefill", "decode")),
    }
    environment = os.environ | {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint}
    client = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", CLIENT, traced.endpoint, "The keeper of the lighthouse wrote: "),
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert client.stdout is not None
    assert client.stdin is not None
    job_id = (await client.stdout.readline()).decode().strip()
    await client.stdout.readline()
    async with operator_of(traced) as operator:
        ack = await operator.override(job_id, "kivi(bits=4)")
    client.stdin.write(b"\n")
    async with asyncio.timeout(TIMEOUT_S):
        assert await client.wait() == 0
        while not (mine := [span for of, span in list(received.spans) if of == "application"]):
            await asyncio.sleep(0.02)
        [root] = mine
        while not wanted <= received.of(root.trace_id).keys():  # each process sends its own, in batches
            await asyncio.sleep(0.02)
    spans = received.of(root.trace_id)
    assert set(spans) == wanted
    parents = {
        door: "application: text_completion",
        "kvpilot-controller: submit": door,
        "kvpilot-worker: worker": door,
        **{f"kvpilot-worker: {name}": "kvpilot-worker: worker" for name in ("queue", "prefill", "decode")},
    }
    assert root.parent_span_id == b""
    for child, parent in parents.items():
        assert spans[child].parent_span_id == spans[parent].span_id
    whole = spans["kvpilot-worker: worker"]
    parts = [spans[f"kvpilot-worker: {name}"] for name in ("queue", "prefill", "decode")]
    assert parts[0].start_time_unix_nano == whole.start_time_unix_nano
    for before, after in pairwise(parts):
        assert before.end_time_unix_nano == after.start_time_unix_nano
    assert parts[-1].end_time_unix_nano == whole.end_time_unix_nano

    [switch] = parts[-1].events
    told = attributes(switch)  # type: ignore[arg-type]
    assert switch.name == "switch"
    assert told["kvpilot.to_pipeline"] == "kivi(bits=4)"
    assert told["kvpilot.ordered_by"] == told["kvpilot.cause"] == "operator"
    assert told["kvpilot.device_bytes_after"] == ack.applied.after.device_bytes
    for span in (root, whole):
        said = attributes(span)
        assert said["gen_ai.operation.name"] == "text_completion"
        assert said["gen_ai.provider.name"] == "kvpilot"
        assert said["gen_ai.response.id"] == job_id
        assert said["gen_ai.response.finish_reasons"] == ["length"]
        assert said["gen_ai.usage.output_tokens"] == 600
        assert said["gen_ai.usage.input_tokens"] > 0
        assert said["gen_ai.request.max_tokens"] == 600
        assert said["gen_ai.request.temperature"] == pytest.approx(0.5)
        assert said["gen_ai.request.seed"] == 7
        assert said["gen_ai.conversation.id"] == "talk"
    assert attributes(spans[door])["gen_ai.request.model"] == "tiny"
    assert attributes(spans[door])["rpc.grpc.status_code"] == 0

    trace_id = root.trace_id.hex()
    events = {
        "controller": ("job accepted", "decision"),
        "worker-0": ("job claimed", "switched", "job finished"),
    }
    for process, named in events.items():
        async with asyncio.timeout(TIMEOUT_S):
            lines = logged(traced, process, job_id)
            while not set(named) <= {line["event"] for line in lines}:
                await asyncio.sleep(0.02)
                lines = logged(traced, process, job_id)
        for line in lines:
            assert (line.get("trace_id"), line["process"]) == (trace_id, process), line
            assert line["event"] == "job accepted" or line["worker"] == "worker-0"
    [switched] = [line for line in lines if line["event"] == "switched"]
    assert switched["epoch"] == ack.epoch


async def test_what_fails_is_marked(traced: Running, collector: tuple[Collector, str]) -> None:
    """A refused call, and a client that carries a trace but exports nothing itself."""
    received, _ = collector
    trace_id = os.urandom(16)
    parent = f"00-{trace_id.hex()}-{os.urandom(8).hex()}-01"
    from kvpilot.v1 import generation_pb2, generation_pb2_grpc

    async with grpc.aio.insecure_channel(traced.endpoint) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        request = generation_pb2.GenerateRequest(prompt="hello", model="nobody's")
        with pytest.raises(grpc.aio.AioRpcError):
            async for _response in stub.Generate(request, metadata=(("traceparent", parent),)):
                pass
    async with asyncio.timeout(TIMEOUT_S):
        while not (spans := received.of(trace_id)):
            await asyncio.sleep(0.02)
    [span] = spans.values()
    assert span.status.code == 2
    assert "nobody's" in span.status.message or "model" in span.status.message
