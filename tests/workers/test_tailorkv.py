"""TailorKV: what becomes of each layer, what its queries read, and that both halves are the stages they are made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from kernels.layout import BLOCK_TOKENS, Format, Tier
from tests.tiny import Drive, prompt, random_profile, run, tiny_engine, tiny_loaded, tiny_profile
from tests.workers.test_selecting import SHAPE, Steps, numbers, step_numbers
from workers.cache.sequence_cache import Occasion
from workers.engine.runner import LoadedModel
from workers.errors import ProblemError
from workers.expected import expected_use
from workers.profile.profile import ModelProfile
from workers.stages.base import LayerPlace
from workers.stages.registry import build

LAYERS = 5
TAILORKV = "quantdense(bits=2) | recallsparse(recent=64, share=0.3)"
TEXT = prompt(700, 5)


def with_concentration(profile: ModelProfile, *values: float) -> ModelProfile:
    return replace(profile, tensors={**profile.tensors, "concentration": torch.tensor(values)})


PROFILE = with_concentration(random_profile(SHAPE), 0.4, 0.93, 0.84)
SPARSE = (False, True, False)


@pytest.fixture(autouse=True)
def _one_torch_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# -- layer by layer --------------------------------------------------------------------------------------------------


def check_blocks(steps: Steps) -> None:
    """Format and tier of every block, as the paper has them."""
    tables, slot, seen = steps.cache.tables, steps.seq.slot, steps.seq.seen
    for layer, sparse in enumerate(SPARSE):
        for block in range(seen // BLOCK_TOKENS):
            behind = seen - (block + 1) * BLOCK_TOKENS
            fmt = Format.RAW if sparse or behind < BLOCK_TOKENS else Format.INT2
            tier = Tier.HOST if sparse and behind >= 64 else Tier.DEVICE
            assert (tables.format[slot, layer, :, block] == fmt).all()
            assert (tables.tier[slot, layer, :, block] == tier).all()


def test_dense_layers_are_quantised_and_read_whole_sparse_ones_recall_what_a_plain_loop_says() -> None:
    steps = Steps(*numbers(400), TAILORKV, profile=PROFILE)
    check_blocks(steps)
    for step in range(80):
        q, k, v = step_numbers(step)
        out, read = steps.step(q, k, v)
        older = (steps.seq.seen - 64) // BLOCK_TOKENS
        for layer, sparse in enumerate(SPARSE):
            wanted = np.ones_like(read[layer])
            if sparse:
                wanted[:, :older] = by_loops(steps, layer, q, older)
                torch.testing.assert_close(out[layer], steps.attend(layer, q, read[layer]), rtol=0, atol=1e-5)
            assert np.array_equal(read[layer], wanted)
        if steps.seq.seen % BLOCK_TOKENS == 0:
            check_blocks(steps)
    assert steps.copies > 100


def by_loops(steps: Steps, layer: int, q: torch.Tensor, older: int) -> np.ndarray:
    """[H, older] the three in ten with the highest bounds, of the blocks on the host."""
    found = np.zeros((SHAPE.kv_heads, older), bool)
    group = SHAPE.queries_per_kv_head
    for head in range(SHAPE.kv_heads):
        keys = steps.k[layer, head, : older * BLOCK_TOKENS].double().view(older, BLOCK_TOKENS, -1)
        bounds = [
            max(
                float(torch.maximum(query * of_block.amin(0), query * of_block.amax(0)).sum())
                for query in q[layer, head * group : (head + 1) * group].double()
            )
            for of_block in keys
        ]
        best = sorted(range(older), key=lambda block: (-bounds[block], -block))[: -(-older * 3 // 10)]
        found[head, best] = True
    return found


def test_only_sparse_layers_take_digests_and_places() -> None:
    steps, all_sparse = (Steps(*numbers(640), TAILORKV, profile=profile) for profile in (PROFILE, ALL_SPARSE))
    few, many = steps.seq.selective, all_sparse.seq.selective
    assert few.pool.places == many.pool.places == 6  # 0.3 of 18
    assert (few.pool.blocks, many.pool.blocks) == (6 * SHAPE.kv_heads, 6 * SHAPE.kv_heads * 3)
    assert 3 * few.nbytes()[0] == many.nbytes()[0]
    assert few.pool._lot.pages < many.pool._lot.pages
    for found, profile in ((steps, PROFILE), (all_sparse, ALL_SPARSE)):
        use, expected = found.cache.use(found.seq), expected_use(found.pipeline, SHAPE, 640, profile)
        names = ("device_bytes", "host_bytes", "shadow_bytes", "device_bytes_16bit")
        assert [getattr(use, name) for name in names] == [getattr(expected, name) for name in names]
        found.cache.close(found.seq)
        assert found.cache.device.used_bytes == found.cache.host.used_bytes == 0


ALL_SPARSE, ALL_DENSE = (with_concentration(PROFILE, *[value] * 3) for value in (0.9, 0.1))


@pytest.mark.parametrize(
    ("text", "profile", "same"),
    [
        ("quantdense(bits=2)", ALL_DENSE, "kivi(bits=2)"),
        ("quantdense(bits=4)", ALL_SPARSE, "full"),
        ("recallsparse(recent=64, share=0.3)", ALL_SPARSE, "arkvale(recent=64, share=0.3)"),
        ("recallsparse(recent=64, share=0.3)", ALL_DENSE, "full"),
        ("recallsparse(recent=64, share=1)", PROFILE, "full"),
        (TAILORKV, ALL_DENSE, "kivi(bits=2)"),
    ],
)
def test_at_their_ends_they_are_stages_that_there_are(text: str, profile: ModelProfile, same: str) -> None:
    mine, other = (Steps(*numbers(400), each, profile=profile) for each in (text, same))
    for step in range(40):
        assert torch.equal(mine.step(*step_numbers(step))[0], other.step(*step_numbers(step))[0])


def test_the_threshold_is_of_the_profile_s_numbers() -> None:
    for threshold, dense in ((0.0, []), (0.4, []), (0.41, [0]), (0.85, [0, 2]), (1.0, [0, 1, 2])):
        codec = build(f"quantdense(threshold={threshold})", SHAPE, PROFILE.names).codec
        places = [LayerPlace(index, SHAPE, 100, PROFILE.layer(index)) for index in range(3)]
        assert [index for index, place in enumerate(places) if codec.ages(place)] == dense
    with pytest.raises(ValueError, match="needs the model's concentration of attention; `kvpilot model profile NAME`"):
        codec.ages(LayerPlace(0, SHAPE, 100))


# -- served ----------------------------------------------------------------------------------------------------------


def loaded() -> LoadedModel:
    """A tiny model whose layers 0 and 3 are said to be dense."""
    found = tiny_loaded(num_hidden_layers=LAYERS)
    shape = tiny_engine(found).shape
    return replace(found, profile=with_concentration(tiny_profile(shape), 0.5, 0.9, 0.95, 0.6, 0.9))


def test_a_request_goes_there_and_back_while_it_generates() -> None:
    drive = Drive(tiny_engine(loaded()))
    drive.submit("job", TEXT[:500], 60)
    drive.until(lambda: drive.generated("job") >= 10)
    before = run(tiny_engine(loaded()), {"job": TEXT[:500]}, 60)["job"].token_ids
    seq = drive.engine._live["job"].cache
    tables, blocks = drive.engine.cache.tables, 500 // BLOCK_TOKENS - 2
    drive.direct("job", TAILORKV)
    assert (tables.format[seq.slot, :, 0, 0] == [Format.INT2, 0, 0, Format.INT2, 0]).all()
    assert (tables.tier[seq.slot, :, 0, 0] == [Tier.DEVICE, Tier.HOST, Tier.HOST, Tier.DEVICE, Tier.HOST]).all()
    drive.until(lambda: drive.generated("job") >= 20)
    drive.direct("job", "full", 2)
    assert not tables.format[seq.slot, :, :, :blocks].any()
    assert not tables.tier[seq.slot, :, :, :blocks].any()
    assert seq.selective is None
    assert seq.shadow is None
    outcome = drive.finish()["job"]
    assert outcome.token_ids[:10] == before[:10]
    assert len(outcome.token_ids) == 60
    assert drive.engine.cache.host.used_bytes == 0


def test_scoring_many_tokens_at_once_reads_what_their_decode_steps_read() -> None:
    engine = tiny_engine(loaded())
    cache, runner = engine.cache, engine._runner
    seq = cache.open(1000)
    cache.reserve(seq, 301)
    runner.prefill(seq, TEXT[:301], 301, all_queries=False)
    cache.apply(seq, build("recallsparse(recent=64, share=0.3)", engine.shape, cache.profile.names), Occasion.PROMPT)
    scored = runner.score(cache.context(seq), seq.seen, TEXT[301:400])
    decoded = []
    for token in TEXT[301:400]:
        cache.reserve(seq, 1)
        decoded.append(runner.decode([seq], [token])[0])
    torch.testing.assert_close(scored, torch.cat(decoded), rtol=0, atol=1e-3)  # of five layers


def test_neighbours_and_batches_do_not_matter() -> None:
    alone = run(tiny_engine(loaded()), {"job": TEXT[:301]}, 48, pipeline="tailorkv")["job"].token_ids
    drive = Drive(tiny_engine(loaded()))
    drive.submit("other", TEXT[100:500], 60)
    drive.submit("job", TEXT[:301], 48, pipeline="tailorkv")
    drive.submit("third", TEXT[200:500], 60, pipeline="quest(share=0.3)")
    assert drive.finish()["job"].token_ids == alone


def test_a_worker_without_a_profile_refuses_it_and_names_the_command() -> None:
    said = (
        "'quantdense' cannot serve this model: it needs the model's concentration of attention; `kvpilot model profile"
    )
    with pytest.raises(ProblemError, match=said):
        run(tiny_engine(), {"job": TEXT[:100]}, 4, pipeline="tailorkv")
