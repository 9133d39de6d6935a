"""Tiny random models and a synchronous way to drive an engine with them."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from kernels.layout import CacheShape
from kvpilot.v1 import generation_pb2, job_pb2, policy_pb2
from workers.engine.attention import ATTENTION_NAME
from workers.engine.engine import Engine
from workers.engine.runner import LoadedModel, wrap_model
from workers.profile.measure import measure
from workers.profile.profile import ModelProfile
from workers.settings import WorkerSettings

VOCABULARY = 258
EOS = 257
CONTEXT = 4096

CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def tiny_config(model_type: str = "llama", **changes: object) -> object:
    """A configuration of two layers with grouped heads."""
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "eos_token_id": EOS,
        "bos_token_id": 256,
        "pad_token_id": EOS,
        "initializer_range": 0.4,
        "tie_word_embeddings": False,
    }
    return AutoConfig.for_model(model_type, **(common | changes))


def tiny_model(
    model_type: str = "llama", attention: str = ATTENTION_NAME, dtype: torch.dtype = torch.float32, **changes
):
    """A random model of that type; the same weights at every call."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **changes), attn_implementation=attention)
    return model.to(dtype).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<bos>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_loaded(model_type: str = "llama", **changes) -> LoadedModel:
    """A tiny model ready to serve."""
    return wrap_model(tiny_model(model_type, **changes), tiny_tokenizer(), "tiny")


@cache
def tiny_profile(shape: CacheShape) -> ModelProfile:
    """The profile of a random llama with a cache of this shape, found from random bytes."""
    model = tiny_model(
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.query_heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        hidden_size=shape.query_heads * shape.head_dim,
    )
    loaded = wrap_model(model, tiny_tokenizer(), "tiny")
    found = measure(loaded, [prompt(400, seed) for seed in range(3)], "0" * 64)
    return replace(found, shape=shape)


def tiny_engine(loaded: LoadedModel | None = None, **settings: object) -> Engine:
    """An engine that is driven by hand: see :func:`run`."""
    defaults = {
        "name": "worker-1",
        "model": Path("tiny"),
        "model_name": "tiny",
        "device_budget_bytes": 64 << 20,
        "host_budget_bytes": 64 << 20,
        "kernel_backend": "cpu",
        "max_context_tokens": 2048,
        "disk_budget_bytes": 0,
    }
    return Engine(WorkerSettings(**(defaults | settings)), loaded or tiny_loaded())


@dataclass
class Outcome:
    """What a job's events say."""

    events: list[generation_pb2.GenerationEvent] = field(default_factory=list)

    @property
    def token_ids(self) -> list[int]:
        return [token.id for event in self.events for token in event.tokens.tokens]

    @property
    def tokens(self) -> list[generation_pb2.Token]:
        return [token for event in self.events for token in event.tokens.tokens]

    @property
    def text(self) -> str:
        return "".join(event.tokens.text for event in self.events)

    @property
    def finished(self) -> generation_pb2.Finished:
        assert self.events[-1].HasField("finished"), "the job has not ended"
        return self.events[-1].finished

    @property
    def switches(self) -> list:
        return [event.switch for event in self.events if event.HasField("switch")]


class Drive:
    """Runs an engine step by step and collects what it says."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.outcomes: dict[str, Outcome] = {}
        self.reports: list[policy_pb2.Report] = []
        engine._on_events = self._collect
        engine._on_report = self.reports.append

    def _collect(self, events) -> None:
        for job_id, event in events:
            self.outcomes.setdefault(job_id, Outcome()).events.append(event)

    def submit(self, name: str, token_ids: list[int], max_tokens: int = 16, emitted: list[int] = (), **request) -> None:
        sampling = generation_pb2.Sampling(max_tokens=max_tokens, ignore_eos=True, **request.pop("sampling", {}))
        message = generation_pb2.GenerateRequest(
            token_ids=generation_pb2.TokenIds(ids=token_ids), sampling=sampling, **request
        )
        self.engine.submit(job_pb2.Job(job_id=name, request=message), emitted)

    def until(self, condition) -> None:
        """Steps until the condition holds; fails when there is nothing left to do."""
        while not condition():
            assert self.engine.step(), "the engine went idle first"

    def generated(self, name: str) -> int:
        return len(self.outcomes[name].token_ids) if name in self.outcomes else 0

    def finish(self) -> dict[str, Outcome]:
        """Steps until nothing is left."""
        while self.engine.step() or self.engine.live_jobs():
            pass
        return self.outcomes

    def direct(self, name: str, pipeline: str, epoch: int = 1, **directive) -> policy_pb2.Ack:
        """The answer to a directive that is carried out at once."""
        return self.order(name, pipeline, epoch, **directive).result(timeout=0)

    def order(self, name: str, pipeline: str, epoch: int = 1, **directive) -> Future[policy_pb2.Ack]:
        """A directive that is carried out, or whose preparation has begun."""
        answer = self.engine.direct(
            policy_pb2.Directive(nonce=f"n{epoch}", epoch=epoch, request_id=name, pipeline=pipeline, **directive)
        )
        self.engine._drain_commands()
        return answer


def run(engine: Engine, jobs: dict[str, list[int]], max_tokens: int = 16, **request) -> dict[str, Outcome]:
    """Runs jobs at once to their ends."""
    drive = Drive(engine)
    for name, token_ids in jobs.items():
        drive.submit(name, token_ids, max_tokens, **request)
    return drive.finish()


def prompt(length: int, seed: int = 0) -> list[int]:
    """Random byte tokens."""
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def reference(model, token_ids: list[int], max_tokens: int) -> list[int]:
    """What transformers' generate answers, greedily."""
    inputs = torch.tensor([token_ids])
    output = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=max_tokens,
        min_new_tokens=max_tokens,
        do_sample=False,
    )
    return output[0, len(token_ids) :].tolist()
