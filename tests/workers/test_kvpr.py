"""Blocks made again from what their layers were given: the same up to rounding, for fewer bytes or more."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from kernels.layout import BLOCK_TOKENS, CacheShape, Format, Tier
from kvpilot.v1 import common_pb2, generation_pb2, job_pb2
from tests.tiny import Drive, prompt, run, tiny_engine, tiny_loaded
from tests.workers.test_audit import ALWAYS, audits_of
from tests.workers.test_switch import IDS, check_tables, logits_now
from workers.cache.arena import TierFullError
from workers.cache.inputs import LayerInputs
from workers.engine.engine import Engine
from workers.errors import FAILED_PRECONDITION, ProblemError
from workers.expected import expected_use
from workers.stages.base import LossClass
from workers.stages.offload.kvpr import KVPR, best_split
from workers.stages.registry import build

LAYERS = 3
RECENT = 64
HALF, ALL, NONE = (f"kvpr(recent={RECENT}, recompute={share})" for share in (0.5, 1.0, 0.0))
OLDER = (len(IDS) - RECENT) // BLOCK_TOKENS
"""Rows on the host behind the prompt."""
MHA = {"num_key_value_heads": 4}
MODELS = (
    ("llama", MHA),
    ("llama", {}),
    ("qwen3", {**MHA, "head_dim": 16}),
    ("qwen3", {"head_dim": 24}),
    ("gpt_neox", MHA),
    ("phi3", {}),
)
every_model = pytest.mark.parametrize(("kind", "changes"), MODELS, ids=lambda value: str(value))


def engine(kind: str = "llama", changes: dict | None = None, **settings: object) -> Engine:
    loaded = tiny_loaded(kind, num_hidden_layers=LAYERS, **(MHA if changes is None else changes))
    return tiny_engine(loaded, **settings)


def decoding(pipeline: str, tokens: int = 10, max_tokens: int = 48, changes: dict | None = None, **settings) -> Drive:
    drive = Drive(engine(changes=changes, **settings))
    drive.submit("job", IDS, max_tokens, pipeline=pipeline)
    drive.until(lambda: drive.generated("job") >= tokens)
    drive.engine._live["job"].pinned = None
    return drive


def cache_of(drive: Drive):
    return drive.engine._live["job"].cache


def made(drive: Drive) -> list[list[int]]:
    """Of each layer the rows that are made again."""
    remaking = cache_of(drive).areas[Tier.HOST]._remaking
    if remaking is None:
        return [[] for _ in range(LAYERS)]
    return [sorted({int(row) for row in of_layer.ravel() if row >= 0}) for of_layer in remaking.row]


# -- the same output -------------------------------------------------------------------------------------------------


@every_model
def test_tokens_and_probabilities_are_full_s(kind: str, changes: dict) -> None:
    outcomes = []
    for pipeline in (ALL, "full"):
        drive = Drive(engine(kind, changes))
        drive.submit("job", IDS, 48, pipeline=pipeline, top_logprobs=3)
        drive.until(lambda drive=drive: drive.generated("job") >= 40)
        if pipeline == ALL:
            assert made(drive) == [list(range(OLDER + 1))] * LAYERS
        outcomes.append(drive.finish()["job"])
        assert drive.engine.cache.host.used_bytes == 0
    assert outcomes[0].token_ids == outcomes[1].token_ids
    assert "kvpr" in outcomes[0].finished.pipeline
    for one, other in zip(*(outcome.tokens for outcome in outcomes), strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@every_model
def test_what_is_made_is_what_is_stored(
    kind: str, changes: dict, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a layer is attended to. What is copied is the same bytes."""
    drive = Drive(engine(kind, changes, kernel_backend=backend))
    drive.submit("job", IDS, 48, pipeline=HALF)
    drive.until(lambda: drive.generated("job") >= 10)
    cache, seq = drive.engine.cache, cache_of(drive)
    home, rows = cache.tables.address[seq.slot].copy(), seq.areas[Tier.HOST]._remaking.row
    assert (rows >= 0).sum() == LAYERS * cache.shape.kv_heads * (OLDER // 2)
    decode, numbers = cache.backend.decode, 2 * BLOCK_TOKENS * cache.shape.head_dim

    def blocks(tier: Tier, address: np.ndarray) -> torch.Tensor:
        return cache.backend.load(tier, address, Format.RAW).view(torch.float32)[:, :numbers]

    def compared(plan, layer, *rest):
        tier, address = cache.tables.tier[seq.slot, layer], cache.tables.address[seq.slot, layer]
        away = home[layer] != address
        assert away.sum() == OLDER * cache.shape.kv_heads
        assert (tier[away] == Tier.DEVICE).all()
        again = away & (np.pad(rows[layer], ((0, 0), (0, away.shape[1] - rows.shape[2])), constant_values=-1) >= 0)
        for which, tolerance in ((again, 1e-5), (away & ~again, 0)):
            found, stored = (blocks(tier, of[which]) for tier, of in ((Tier.DEVICE, address), (Tier.HOST, home[layer])))
            assert found.abs().max() > 0.1
            torch.testing.assert_close(found, stored, rtol=tolerance, atol=tolerance)
        return decode(plan, layer, *rest)

    monkeypatch.setattr(cache.backend, "decode", compared)
    for _ in range(2):
        drive.engine.step()


def test_what_is_made_is_what_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    drive = decoding(HALF)
    remaker, expected, asked = drive.engine.cache.remaker, logits_now(drive, "job"), []
    make = remaker.make

    def nothing(layer, inputs, position):
        asked.append((layer, position.tolist()))
        return tuple(torch.zeros_like(part) for part in make(layer, inputs, position))

    monkeypatch.setattr(remaker, "make", nothing)
    assert (logits_now(drive, "job") - expected).abs().max() > 0.01
    assert asked == [(layer, list(range(OLDER // 2 * BLOCK_TOKENS))) for layer in range(LAYERS)]


@pytest.mark.parametrize("step_tokens", [45, 96])
def test_output_does_not_depend_on_the_chunk_size(step_tokens: int) -> None:
    expected = run(engine(), {"job": IDS}, 48)["job"].token_ids
    assert run(engine(step_tokens=step_tokens), {"job": IDS}, 48, pipeline=HALF)["job"].token_ids == expected


def test_neighbours_do_not_meet() -> None:
    """One of them has hooks of its own on what layers are given."""

    def among(pipelines: dict[int, str]) -> dict[str, list[int]]:
        drive = Drive(engine())
        for n, pipeline in pipelines.items():
            drive.submit(f"n{n}", prompt(200 + 30 * n, n), 40, pipeline=pipeline)
        return {name: outcome.token_ids for name, outcome in drive.finish().items()}

    mixed = dict(enumerate([HALF, "layerkv(recent=64)", ALL, NONE, "full"]))
    guessing = {5: "infinigen(recent=64, share=0.5)"}
    assert among(mixed | guessing) == among(dict.fromkeys(mixed, "full")) | among(guessing)


# -- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "less"), [(MHA, True), ({}, False)], ids=["mha", "gqa"])
def test_what_crosses_the_link_each_step(changes: dict, less: bool) -> None:
    """Of MHA a made row's inputs are half of its blocks. Two query heads to a KV head: as much."""
    moved = {}
    for pipeline, share in ((NONE, 0.0), (HALF, 0.5), (ALL, 1.0)):
        drive = decoding(pipeline, changes=changes)
        shape, seq = drive.engine.cache.shape, cache_of(drive)
        before = seq.recalls.moved_bytes[Tier.HOST, Tier.DEVICE]
        for _ in range(3):
            drive.engine.step()
        again, block = int(share * OLDER), shape.block_bytes(Format.RAW)
        inputs = again * BLOCK_TOKENS * shape.query_heads * shape.head_dim * 4
        moved[share] = seq.recalls.moved_bytes[Tier.HOST, Tier.DEVICE] - before
        assert moved[share] == 3 * LAYERS * ((OLDER - again) * shape.kv_heads * block + inputs)
    assert (moved[1.0] == moved[0.0] / 2) if less else (moved[1.0] == moved[0.0])


@pytest.mark.parametrize("changes", [MHA, {}, {"num_key_value_heads": 1}], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("pipeline", [HALF, ALL, NONE])
def test_bytes_are_what_is_allocated_and_what_was_foretold(pipeline: str, changes: dict) -> None:
    drive = decoding(pipeline, tokens=1, max_tokens=16, changes=changes)
    cache, seq = drive.engine.cache, cache_of(drive)
    shape, block, heads = cache.shape, cache.shape.block_bytes(Format.RAW), cache.shape.kv_heads
    used, share = cache.use(seq), build(pipeline, cache.shape).recomputed
    noted = int(share * (len(IDS) + 16) // BLOCK_TOKENS)
    pieces = shape.query_heads // 2
    assert used.host_bytes == LAYERS * block * (OLDER * heads + noted * pieces)
    assert 0 <= cache.host.used_bytes - used.host_bytes < 3 * cache.host.page_bytes
    again = int(share * OLDER)
    assert seq.areas[Tier.HOST].nbytes[0] == 2 * block * (OLDER * heads + again * max(0, pieces - heads))
    told = expected_use(build(pipeline, shape), shape, len(IDS))
    for name in ("device_bytes", "host_bytes", "shadow_bytes", "device_bytes_16bit"):
        assert getattr(used, name) == getattr(told, name), name
    check_tables(drive)
    drive.finish()
    assert cache.host.used_bytes == 0


def test_nothing_is_noted_beside_a_codec_or_an_evictor() -> None:
    for text, plain in ((f"int8 | {HALF}", "int8"), (f"snapkv(keep=0.5) | {HALF}", "snapkv(keep=0.5)")):
        drive = decoding(text)
        assert cache_of(drive).inputs is None
        assert made(drive) == [[]] * LAYERS
        shape = drive.engine.cache.shape
        assert build(text, shape).logits_key == build(plain, shape).logits_key
        assert torch.equal(logits_now(drive, "job"), logits_now(decoding(plain), "job"))


# -- which rows ------------------------------------------------------------------------------------------------------


def test_as_many_rows_are_noted_as_may_be_made() -> None:
    drive = decoding(HALF, tokens=40, max_tokens=100)
    seq = cache_of(drive)
    assert seq.inputs.rows == (len(IDS) + 100) // BLOCK_TOKENS // 2
    assert made(drive) == [list(range((OLDER + 1) // 2))] * LAYERS


def test_after_a_switch_rows_computed_since_are_made() -> None:
    expected = run(engine(), {"job": IDS}, 260)["job"].token_ids
    drive = decoding("full", max_tokens=260)
    drive.direct("job", HALF)
    assert made(drive) == [[]] * LAYERS
    drive.until(lambda: drive.generated("job") >= 240)
    first = -(-(len(IDS) + 10) // BLOCK_TOKENS)  # the first row that was begun behind the switch
    rows = (len(IDS) + 240 - RECENT) // BLOCK_TOKENS
    assert made(drive) == [list(range(first, rows))] * LAYERS
    assert 0 < rows - first <= rows // 2
    check_tables(drive)
    assert drive.finish()["job"].token_ids == expected


def test_rows_from_a_prefix_are_copied() -> None:
    drive = Drive(engine())
    drive.submit("first", IDS[:100], 4)
    drive.finish()
    drive.submit("job", IDS, 48, pipeline=ALL)
    drive.until(lambda: drive.generated("job") >= 3)
    assert made(drive) == [list(range(3, OLDER))] * LAYERS
    assert drive.finish()["job"].token_ids == run(engine(), {"job": IDS}, 48)["job"].token_ids


def test_rows_are_noted_as_they_are_given() -> None:
    """In chunks of any size; a row with a gap, or beyond what may be noted, is not."""
    made_engine = engine()
    cache, width = made_engine.cache, 64
    inputs = LayerInputs(cache.host, cache.backend, cache.remaker, 400)
    inputs.most_rows = 4
    given = torch.randn(LAYERS, 400, width, generator=torch.Generator().manual_seed(1))
    for start, end in itertools.pairwise([0, 7, 32, 90, 96, 97]):
        for layer in range(LAYERS):
            inputs.note(layer, start, given[layer, start:end])
    for layer in range(LAYERS):  # 97 to 99 are missing
        inputs.note(layer, 100, given[layer, 100:330])
    assert inputs.rows == 4  # the last of them for good
    assert inputs._noted[:5].tolist() == [32, 32, 32, 1, 0]
    channels = 2 * cache.shape.head_dim
    for layer, row in itertools.product(range(LAYERS), range(3)):
        packed = cache.backend.load(Tier.HOST, inputs.address(layer, np.array([row])), Format.RAW)
        found = packed.view(torch.float32)[:, : BLOCK_TOKENS * channels].view(-1, BLOCK_TOKENS, channels)
        wanted = given[layer, row * BLOCK_TOKENS :][:BLOCK_TOKENS]
        assert torch.equal(found.transpose(0, 1).flatten(1)[:, :width], wanted)
    assert inputs.nbytes == 4 * LAYERS * 2 * cache.shape.block_bytes(Format.RAW)
    inputs.close()
    assert cache.host.used_bytes == 0


# -- there and back --------------------------------------------------------------------------------------------------


def test_a_switch_away_restores_every_bit_and_gives_inputs_up() -> None:
    drive = decoding("full")
    expected = logits_now(drive, "job")
    epoch = itertools.count(1)
    others = ("full", "host(recent=64)", "layerkv(recent=64)", "neardata(recent=64)", "kivi(bits=4)", "window")
    for other in others:
        drive.direct("job", other, epoch=next(epoch))
        directly = logits_now(drive, "job")
        for pipeline, wanted in ((HALF, expected), (other, directly), (HALF, expected)):
            drive.direct("job", pipeline, epoch=next(epoch))
            check_tables(drive)
            torch.testing.assert_close(logits_now(drive, "job"), wanted, rtol=0, atol=1e-5 if pipeline == HALF else 0)
            assert (cache_of(drive).inputs is None) == (pipeline != HALF)
        drive.direct("job", "full", epoch=next(epoch))
        assert torch.equal(logits_now(drive, "job"), expected)
    assert drive.engine.cache.host.used_bytes == 0


def test_from_the_start_too() -> None:
    """Rows that were noted with the prompt: away, they are copied again when it comes back."""
    drive = decoding(ALL, tokens=40)
    expected = logits_now(drive, "job")
    drive.direct("job", "host(recent=64)", epoch=1)
    directly = logits_now(drive, "job")
    torch.testing.assert_close(directly, expected, rtol=0, atol=1e-5)
    drive.direct("job", ALL, epoch=2)
    assert torch.equal(logits_now(drive, "job"), directly)
    assert made(drive) == [[]] * LAYERS


def test_a_smaller_share_makes_fewer_of_what_was_noted() -> None:
    drive = decoding(ALL)
    expected, rows = logits_now(drive, "job"), cache_of(drive).inputs.rows
    drive.direct("job", HALF)
    assert made(drive) == [list(range(OLDER // 2))] * LAYERS
    assert cache_of(drive).inputs.rows == rows
    torch.testing.assert_close(logits_now(drive, "job"), expected, rtol=0, atol=1e-5)


def test_inputs_give_way_to_whoever_needs_the_host() -> None:
    """While the next step's first layer is on its way; what is there of theirs may be overwritten at once."""
    drive = decoding(HALF)
    cache, seq = drive.engine.cache, cache_of(drive)
    expected = logits_now(drive, "job")
    assert any(slot.inputs for slot in seq.areas[Tier.HOST]._slots)
    freed, lot = seq.inputs.lot.pages * cache.host.page_bytes, cache.host.open_lot(Format.RAW)
    assert cache.host.guest_bytes == freed
    blocks = cache.host.room_bytes // cache.shape.block_bytes(Format.RAW)
    with pytest.raises(TierFullError):
        cache.host.require(np.zeros(0, np.int32), [(None, Format.RAW, blocks + 1)])
    address = cache.host.allocate(lot, blocks)
    noise = torch.randint(0, 256, (blocks, cache.shape.block_bytes(Format.RAW)), dtype=torch.uint8)
    cache.backend.store(Tier.HOST, address, noise)
    assert seq.inputs is None
    assert made(drive) == [[]] * LAYERS
    torch.testing.assert_close(logits_now(drive, "job"), expected, rtol=0, atol=1e-5)
    drive.until(lambda: drive.generated("job") >= 40)
    assert seq.inputs is None or not seq.inputs.rows  # there is no room to note any
    cache.host.close_lot(lot)
    outcome = drive.finish()["job"]
    assert outcome.token_ids == run(engine(), {"job": IDS}, 48)["job"].token_ids


def test_they_do_so_before_sessions() -> None:
    drive = Drive(engine())
    drive.submit("first", prompt(200, 1), 4, session_id="talk")
    drive.finish()
    drive.submit("job", IDS, 48, pipeline=HALF)
    drive.until(lambda: drive.generated("job") >= 3)
    host, seq, parked = drive.engine.cache.host, cache_of(drive), drive.engine.sessions.host_bytes
    pages = host.free_bytes // host.page_bytes + seq.inputs.lot.pages
    lot = host.open_lot(Format.RAW)
    host.allocate(lot, pages * host.page_bytes // host.shape.block_bytes(Format.RAW))
    assert seq.inputs is None
    assert drive.engine.sessions.host_bytes == parked > 0
    host.close_lot(lot)


def test_a_host_with_room_for_the_blocks_alone_serves() -> None:
    row = engine().cache.worst_bytes(1)
    expected = run(engine(), {"job": IDS}, 16)["job"].token_ids
    small = engine(host_budget_bytes=(OLDER + 1) * row, step_tokens=64)
    outcome = run(small, {"job": IDS}, 16, pipeline=ALL)["job"]
    assert outcome.token_ids == expected
    assert "kvpr" in outcome.finished.pipeline
    assert not outcome.finished.usage.preemptions


def test_a_fork_copies() -> None:
    drive = decoding("full", max_tokens=260)
    drive.direct("job", ALL)
    drive.until(lambda: drive.generated("job") >= 140)
    assert made(drive)[0]
    cache, seq = drive.engine.cache, cache_of(drive)
    used = cache.host.used_bytes
    fork = cache.fork(seq)
    assert fork.inputs is None
    for own in (fork, seq):
        cache.reserve(own, 1)
    logits, _ = drive.engine._runner.decode([fork, seq], [drive.engine._live["job"].token_ids[-1]] * 2)
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-5)
    cache.close(fork)
    assert cache.host.used_bytes == used
    assert seq.inputs.rows


def test_a_turn_is_parked_without_its_inputs_and_resumed() -> None:
    drive = Drive(engine())
    drive.submit("first", IDS, 16, pipeline=HALF, session_id="talk")
    answer = drive.finish()["first"].token_ids
    cache = drive.engine.cache
    assert cache.host.used_bytes == drive.engine.sessions.host_bytes
    ids = [*IDS, *answer, *prompt(140, 8)]
    drive.submit("job", ids, 16, pipeline=ALL, session_id="talk")
    drive.until(lambda: drive.generated("job") >= 3)
    reused = drive.engine._live["job"].reused_prompt_tokens // BLOCK_TOKENS
    assert reused == len(IDS) // BLOCK_TOKENS
    assert made(drive) == [list(range(reused, (len(ids) - RECENT) // BLOCK_TOKENS))] * LAYERS
    assert drive.finish()["job"].token_ids == run(engine(), {"job": ids}, 16)["job"].token_ids


def test_a_preempted_request_begins_again() -> None:
    drive = decoding(HALF)
    drive.engine._scheduler.preempt(drive.engine._live["job"])
    assert drive.engine.cache.host.used_bytes == 0
    outcome = drive.finish()["job"]
    assert outcome.finished.usage.preemptions == 1
    assert outcome.token_ids == run(engine(), {"job": IDS}, 48)["job"].token_ids


# -- exactness, refusals -----------------------------------------------------------------------------------------------


def test_it_is_exact_only_where_nothing_is_made() -> None:
    assert KVPR().loss_class is LossClass.RECOVERABLE
    assert KVPR(recompute=0.0).loss_class is LossClass.EXACT
    assert torch.equal(logits_now(decoding(NONE), "job"), logits_now(decoding("full"), "job"))
    for pipeline, exact in ((HALF, len(IDS)), (NONE, None)):
        drive = decoding(pipeline, tokens=40)
        seq = cache_of(drive)
        assert seq.exact_tokens == exact
        assert not seq.lost
        assert drive.engine.cache.use(seq).shadow_bytes == 0


def test_audits_find_nothing_but_rounding() -> None:
    drive = decoding(ALL, max_tokens=32, **ALWAYS)
    outcome = drive.finish()["job"]
    audits = audits_of(drive)
    assert len(audits) == 16  # those of the first report
    assert max(audit.divergence for audit in audits) < 1e-6
    assert outcome.token_ids == run(engine(), {"job": IDS}, 32)["job"].token_ids


def test_an_exact_request_is_not_moved_there() -> None:
    drive = Drive(engine())
    request = generation_pb2.GenerateRequest(
        token_ids=generation_pb2.TokenIds(ids=IDS), scenario=common_pb2.SCENARIO_ACCURACY_CRITICAL
    )
    drive.engine.submit(job_pb2.Job(job_id="job", request=request))
    drive.until(lambda: drive.generated("job") >= 3)
    with pytest.raises(ProblemError) as refused:
        drive.direct("job", HALF)
    assert refused.value.problem.code == FAILED_PRECONDITION
    drive.direct("job", NONE, epoch=2)


def test_models_whose_angles_change_are_refused() -> None:
    loaded = tiny_loaded(rope_scaling={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    drive = Drive(tiny_engine(loaded))
    with pytest.raises(ProblemError, match=r"'kvpr' cannot make .* type 'dynamic'"):
        drive.submit("job", IDS, 8, pipeline=HALF)
    with pytest.raises(ValueError, match="'kvpr' cannot make"):
        tiny_engine(loaded, default_pipeline=HALF)
    drive.submit("job", IDS, 8, pipeline=NONE)
    assert len(drive.finish()["job"].token_ids) == 8


def test_models_that_make_keys_of_more_are_refused() -> None:
    """Here attention adds to its input each time it is called, so that it is not what was noted."""

    def add(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        given = kwargs.pop("hidden_states", None)
        return ((args[0] if args else given) + 1.0,), kwargs

    loaded = tiny_loaded()
    loaded.model.model.layers[1].self_attn.register_forward_pre_hook(add, with_kwargs=True)
    with pytest.raises(ProblemError, match="makes keys and values of layer 1 from more"):
        Drive(tiny_engine(loaded)).submit("job", IDS, 8, pipeline=HALF)


def test_models_whose_attention_cannot_be_called_by_itself_serve_without_it() -> None:
    def ask(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        kwargs["position_ids"]

    loaded = tiny_loaded()
    loaded.model.model.layers[0].self_attn.register_forward_pre_hook(ask, with_kwargs=True)
    drive = Drive(tiny_engine(loaded))
    with pytest.raises(ProblemError, match=r"cannot be called by itself .*position_ids"):
        drive.submit("job", IDS, 8, pipeline=HALF)
    drive.submit("job", IDS, 8)
    assert len(drive.finish()["job"].token_ids) == 8


# -- the split ---------------------------------------------------------------------------------------------------------


def layer_s(share: float, k: float, a: float, flops: float, link: float, device: float, other_s: float) -> float:
    """What a layer takes in the long run: the link brings a layer's inputs and then its blocks, from when the layer
    before begins; the device makes blocks when the inputs are there, and attends when all is."""
    now = link_free = inputs = rest = 0.0
    times = []
    for _ in range(2000):
        begins = max(now if share else max(now, rest), link_free)
        ahead_inputs = begins + share * a / link
        ahead_rest = link_free = ahead_inputs + (1 - share) * k / link
        now = max(max(now, inputs) + share * flops / device, rest) + other_s
        inputs, rest = ahead_inputs, ahead_rest
        times.append(now)
    return (times[-1] - times[999]) / 1000


@pytest.mark.parametrize("inputs", [0.25, 0.5, 0.9, 1.0, 2.0])
@pytest.mark.parametrize("flops", [0.0, 0.3, 1.0, 4.0])
@pytest.mark.parametrize("other_s", [0.0, 0.2, 0.7, 1.5])
def test_the_best_split_is_that_of_all_shares(inputs: float, flops: float, other_s: float) -> None:
    """A layer's blocks take a second to copy; everything else is said beside that."""
    figures = (1e9, inputs * 1e9, flops * 1e12, 1e9, 1e12)
    found = best_split(int(figures[0]), int(figures[1]), *figures[2:], other_s)
    best = min(layer_s(share / 40, *figures, other_s) for share in range(41))
    assert layer_s(found.share, *figures, other_s) <= best + 1e-6
    if inputs >= 1:
        assert found.share == 0
        assert "no smaller" in found.reason
    elif other_s >= 1:
        assert found.share == 0
        assert "before the layer" in found.reason
    else:
        assert found.share > 0


def test_the_split_of_a_model_on_a_link() -> None:
    """Of 4096 channels and 32 heads of 128, 16-bit numbers, 8,192 tokens, 25 GB/s and 100 Tflop/s."""
    tokens, width, heads, dim = 8192, 4096, 32, 128
    shape = CacheShape(1, heads, heads, dim, torch.bfloat16)
    kv_bytes = tokens // BLOCK_TOKENS * heads * shape.block_bytes(Format.RAW)
    found = best_split(kv_bytes, tokens * width * 2, 4.0 * tokens * width * heads * dim, 25e9, 100e12)
    assert found.share == pytest.approx(5.369 / (2.684 + 5.498), abs=1e-3)
    with pytest.raises(ValueError, match="bytes_per_s: 0 given"):
        best_split(1, 1, 1, 0, 1)
    with pytest.raises(ValueError, match="layer_s: -1 given"):
        best_split(1, 1, 1, 1, 1, -1)
