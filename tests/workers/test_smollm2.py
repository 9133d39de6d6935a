"""What must hold on a real model: SmolLM2-135M-Instruct and real text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from kernels.layout import BLOCK_TOKENS, Format
from tests.tiny import Drive, reference, run
from tests.workers.test_switch import logits_now
from workers.cache.accounting import TABLE_BYTES_PER_BLOCK
from workers.cache.sequence_cache import Occasion
from workers.engine.engine import Engine
from workers.engine.runner import LoadedModel, load_model
from workers.settings import WorkerSettings
from workers.stages.registry import build

pytestmark = [pytest.mark.model, pytest.mark.slow]

LENGTHS = (200, 450, 900, 1600, 3000)
ANSWER_TOKENS = 24


@pytest.fixture(scope="module")
def loaded(smollm2: Path) -> LoadedModel:
    return load_model(smollm2, "smollm2", torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def text_ids(loaded: LoadedModel) -> list[int]:
    """Real text: the licence this project comes with, about 2,200 tokens a copy."""
    licence = (Path(__file__).parents[2] / "LICENSE").read_text()
    return loaded.tokenizer(licence + licence)["input_ids"]


def engine(loaded: LoadedModel, **settings: object) -> Engine:
    defaults = {
        "model": Path("smollm2"),
        "device_budget_bytes": 768 << 20,
        "host_budget_bytes": 768 << 20,
        "max_context_tokens": 3200,
    }
    return Engine(WorkerSettings(**(defaults | settings)), loaded)


@pytest.fixture(scope="module")
def prompts(text_ids: list[int]) -> dict[str, list[int]]:
    return {str(length): text_ids[length // 3 :][:length] for length in LENGTHS}


@pytest.fixture(scope="module")
def expected(smollm2: Path, prompts: dict[str, list[int]]) -> dict[str, list[int]]:
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    return {name: reference(model, ids, ANSWER_TOKENS) for name, ids in prompts.items()}


@pytest.mark.parametrize(("step_tokens", "device_mib", "count"), [(512, 768, len(LENGTHS)), (170, 90, 4)])
def test_greedy_equals_generate(loaded, prompts, expected, step_tokens: int, device_mib: int, count: int) -> None:
    """All at once, in two chunk sizes; the second time in too little memory for all of them."""
    served = engine(loaded, step_tokens=step_tokens, device_budget_bytes=device_mib << 20)
    asked = dict(list(prompts.items())[:count])
    outcomes = run(served, asked, max_tokens=ANSWER_TOKENS, pipeline="full")
    assert {name: outcome.token_ids for name, outcome in outcomes.items()} == {name: expected[name] for name in asked}
    moved = [outcome for outcome in outcomes.values() if outcome.switches or outcome.finished.usage.preemptions]
    assert bool(moved) == (device_mib < 768)


def test_every_bit_of_the_logits_is_the_same_from_disk(loaded, prompts, tmp_path: Path) -> None:
    """And from attention beside the host's memory they are the same up to rounding."""
    served = engine(loaded, disk_folder=tmp_path, disk_budget_bytes=256 << 20, switch_step_share=100.0)
    drive = Drive(served)
    drive.submit("job", prompts["450"], ANSWER_TOKENS)
    drive.until(lambda: drive.generated("job") >= 2)
    expected = logits_now(drive, "job")
    drive.direct("job", "disk(recent=64)", epoch=1)
    assert served.cache.disk is not None
    assert served.cache.disk.used_bytes > 12 * 90 * served.shape.block_bytes(Format.RAW)
    for _ in range(2):  # the second time some of it was read ahead
        assert torch.equal(logits_now(drive, "job"), expected)
    drive.direct("job", "neardata(recent=64)", epoch=2)
    torch.testing.assert_close(logits_now(drive, "job"), expected, rtol=1e-4, atol=1e-3)
    drive.direct("job", "full", epoch=3)
    assert torch.equal(logits_now(drive, "job"), expected)
    served.stop(1.0)


def test_a_trip_to_the_host_and_back_changes_no_token(loaded, prompts, expected) -> None:
    drive = Drive(engine(loaded))
    drive.submit("job", prompts["900"], ANSWER_TOKENS)
    drive.until(lambda: drive.generated("job") >= 5)
    for epoch, pipeline in enumerate(("host(recent=64)", "full"), start=1):  # of 2,610 blocks, prepared over some steps
        answer = drive.order("job", pipeline, epoch)
        drive.until(answer.done)
        assert answer.result(timeout=0).applied.to_pipeline == pipeline
    assert drive.finish()["job"].token_ids == expected["900"]


def test_int4_and_back_restores_the_logits_bit_for_bit(loaded, prompts) -> None:
    drive = Drive(engine(loaded, switch_least_blocks=1 << 20))  # at once: no step may come between the logits compared
    drive.submit("job", prompts["450"], ANSWER_TOKENS)
    drive.until(lambda: drive.generated("job") >= 5)
    before = logits_now(drive, "job")
    drive.direct("job", "kivi(bits=4)", epoch=1)
    assert not torch.equal(logits_now(drive, "job"), before)
    drive.direct("job", "full", epoch=2)
    assert torch.equal(logits_now(drive, "job"), before)


def test_divergence_of_int8_and_int4(loaded, text_ids: list[int], record_property) -> None:
    """Mean KL to the full cache's next-token distribution over the last quarter of 800 tokens, teacher-forced."""
    served = engine(loaded)
    cache, runner = served.cache, served._runner
    ids, start = text_ids[500:1300], 600
    pipelines = [build(text, served.shape) for text in ("full", "kivi(bits=8)", "kivi(bits=4)")]
    sequences = []
    for pipeline in pipelines:
        sequence = cache.open(len(ids))
        cache.reserve(sequence, start)
        runner.prefill(sequence, ids[:start], start, all_queries=False)
        cache.apply(sequence, pipeline, Occasion.PROMPT)
        sequences.append(sequence)
    divergences = []
    for token in ids[start:]:
        for sequence in sequences:
            cache.reserve(sequence, 1)
        logits, _ = runner.decode(sequences, [token] * len(sequences))
        logprobs = torch.log_softmax(logits.double(), dim=-1)
        divergences.append((logprobs[0].exp() * (logprobs[0] - logprobs)).sum(dim=-1).tolist())
        for sequence, pipeline in zip(sequences, pipelines, strict=True):
            if sequence.seen % BLOCK_TOKENS == 0:
                cache.apply(sequence, pipeline, Occasion.SETTLE)
    _, int8, int4 = np.mean(divergences, axis=0)
    record_property("int8_nats", float(int8))
    record_property("int4_nats", float(int4))
    print(f"mean divergence over {len(divergences)} tokens: int8 {int8:.2e}, int4 {int4:.2e} nats")
    assert 0 < int8 < 1e-3
    assert int8 < int4 < 0.03


def test_peak_bytes_of_int4(loaded, text_ids: list[int]) -> None:
    """At most 0.36 of raw in 16-bit reckoning: scales, zero points and tables counted, the 32 raw tokens aside."""
    outcome = run(engine(loaded), {"job": text_ids[:1200]}, max_tokens=40, pipeline="kivi(bits=4)")["job"]
    shape, cache = engine(loaded).shape, outcome.finished.cache
    raw_row = shape.layers * shape.kv_heads * (shape.block_bytes_16bit(Format.RAW) + TABLE_BYTES_PER_BLOCK)
    ratio = (cache.peak_device_bytes_16bit - raw_row) / cache.full_cache_bytes_16bit
    print(f"peak of kivi(bits=4): {ratio:.3f} of raw")
    assert ratio <= 0.36
