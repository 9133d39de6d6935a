"""A client that has nothing of kvpilot but its .proto files, as one in another language would."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from grpc_tools import protoc

from tests.e2e.serving import TIMEOUT_S, Running
from tests.tiny import reference, tiny_tokenizer

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(2 * TIMEOUT_S)]
PROTOS = Path(__file__).resolve().parents[2] / "protos" / "kvpilot" / "v1"
PROMPT = "The keeper of the lighthouse wrote: "

CLIENT = """
import json, sys
target, stubs, *packages = sys.argv[1:]
sys.path[:0] = [stubs, *packages]
import grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from elsewhere.v1 import generation_pb2, generation_pb2_grpc, operator_pb2, operator_pb2_grpc

with grpc.insecure_channel(target) as channel:
    ask = reflection_pb2.ServerReflectionRequest(list_services="")
    [answer] = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([ask]))
    services = [service.name for service in answer.list_services_response.service]
    ask = reflection_pb2.ServerReflectionRequest(file_containing_symbol="kvpilot.v1.GenerationService")
    [answer] = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([ask]))
    described = len(answer.file_descriptor_response.file_descriptor_proto)

    stub = generation_pb2_grpc.GenerationServiceStub(channel)
    models = stub.ListModels(generation_pb2.ListModelsRequest()).models
    request = generation_pb2.GenerateRequest(prompt=sys.stdin.read(), pipeline="full")
    request.sampling.max_tokens = 24
    request.sampling.ignore_eos = True
    events = [response.event for response in stub.Generate(request)]
    job_id = events[0].accepted.job_id
    resume = generation_pb2.ResumeRequest(job_id=job_id, offset=2)
    again = [response.event for response in stub.Resume(resume)]
    workers = operator_pb2_grpc.OperatorServiceStub(channel).ListWorkers(operator_pb2.ListWorkersRequest()).workers

assert not [name for name in sys.modules if name.split(".")[0] == "kvpilot"]
print(json.dumps({
    "services": services,
    "described": described,
    "models": [model.name for model in models],
    "tokens": [token.id for event in events for token in event.tokens.tokens],
    "resumed": again == events[2:],
    "reason": generation_pb2.FinishReason.Name(events[-1].finished.reason),
    "workers": [worker.hello.worker for worker in workers],
}))
"""


@pytest.fixture
def stubs(tmp_path: Path) -> Path:
    """Stubs of the .proto files under a package root of their own."""
    sources = tmp_path / "sources" / "elsewhere" / "v1"
    sources.mkdir(parents=True)
    for proto in PROTOS.glob("*.proto"):
        text = re.sub(r'^import "kvpilot/', 'import "elsewhere/', proto.read_text(), flags=re.MULTILINE)
        (sources / proto.name).write_text(text)
    into = tmp_path / "stubs"
    into.mkdir()
    include = Path(protoc.__file__).parent / "_proto"
    command = ["protoc", f"-I{tmp_path / 'sources'}", f"-I{include}", f"--python_out={into}"]
    files = [str(path) for path in sorted(sources.iterdir())]
    assert protoc.main([*command, f"--grpc_python_out={into}", *files]) == 0
    return into


def test_a_client_from_the_protos_alone(shared: Running, stubs: Path, transformers_model: Any) -> None:
    packages = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", CLIENT, shared.endpoint, str(stubs), *packages],
        input=PROMPT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        cwd=stubs,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert {
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
        "kvpilot.v1.GenerationService",
        "kvpilot.v1.OperatorService",
        "kvpilot.v1.SteeringService",
    } == set(said["services"])
    assert said["described"] >= 1
    assert said["models"] == ["tiny"]
    assert said["tokens"] == reference(transformers_model, tiny_tokenizer()(PROMPT)["input_ids"], 24)
    assert said["resumed"]
    assert said["reason"] == "FINISH_REASON_LENGTH"
    assert said["workers"] == ["worker-0"]
