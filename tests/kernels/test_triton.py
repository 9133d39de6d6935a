"""What only the Triton backend has: increments that stay on the device, padded batches, splits, compiled kernels."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.api import Tables
from kernels.backends import best_for, make_backend
from kernels.layout import BLOCK_TOKENS, MEMORY_TIERS, CacheShape, Format, Tier

pytest.importorskip("triton", reason="not installed here")

from kernels.triton_plan import LEAST_SPLIT_BLOCKS, Work, bucket_size, split_blocks

ROOT = Path(__file__).parents[2]
SHAPE = CacheShape(2, 2, 6, 16, torch.float32)


def steps(world, batches):
    """Decodes a token of each batch's slots, in all layers, and makes room for the next."""
    for seed, slots in enumerate(batches):
        plan = world.backend.plan(np.array(slots, np.int32))
        for layer in range(world.shape.layers):
            world.backend.decode(plan, layer, *world.step(slots, seed), 0.25)
        world.tables.length[slots] += 1


def test_one_settlement_for_many_steps(make_any_world):
    """Masses and votes are what they would be if the host had seen every step; until then it sees none."""
    kept = np.array([[[40, 63], [30, 31]], [[10, 1], [0, 70]], [[5, 5], [5, 5]]])
    batches = [[0, 1], [1], [1, 0], [0], [0, 1]]
    worlds = {name: make_any_world(name, SHAPE, kept, tuple(Format), MEMORY_TIERS) for name in ("reference", "triton")}
    for world in worlds.values():
        world.tables.mass[:], world.tables.votes[:] = 3.0, 2.0
        for slot in range(3):  # nothing is there yet for tokens to come
            for place in np.ndindex(SHAPE.layers, SHAPE.kv_heads):
                world.tables.mass[slot, *place, kept[slot, *place] :] = 0
                world.tables.votes[slot, *place, kept[slot, *place] :] = 0
    before = worlds["triton"].tables.mass.copy()
    for world in worlds.values():
        steps(world, batches)
    expected, tables = worlds["reference"].tables, worlds["triton"].tables
    assert np.array_equal(tables.mass, before)

    settle = worlds["triton"].backend.settle
    settle(np.array([0], np.int32))
    assert np.array_equal(tables.mass[1], before[1])
    settle(np.arange(3, dtype=np.int32))
    for _ in range(2):
        np.testing.assert_allclose(tables.mass, expected.mass, atol=1e-5)
        np.testing.assert_allclose(tables.votes, expected.votes, rtol=4e-3, atol=1e-5)
        settle(np.arange(3, dtype=np.int32))  # nothing is counted twice


def test_rows_that_pad_a_batch(make_any_world):
    """A captured graph has its bucket's rows; those without a request come out as zeros and touch nothing."""

    def run(padding):
        world = make_any_world("triton", SHAPE, np.full((3, 2, 2), 40))
        plan = world.backend.plan(np.arange(3, dtype=np.int32))
        assert plan.bucket.key.rows == 4
        q, k, v = (torch.cat([x, torch.full((padding, *x.shape[1:]), torch.nan)]) for x in world.step([0, 1, 2]))
        output = world.backend.decode(plan, 1, q, k, v, 0.25)
        world.backend.finish(plan)
        return output, plan.block_mass

    (output, mass), (alone, mass_alone) = run(1), run(0)
    assert torch.equal(output[:3], alone)
    assert not output[3:].any()
    assert np.array_equal(mass, mass_alone)
    with pytest.raises(ValueError, match="5 rows, must be 3, or more up to the bucket's 4"):
        run(2)


def test_rows_that_pad_a_batch_with_partials(make_any_world):
    """Partials have the padded rows too, in buffers that a captured graph reads."""

    def run(padding):
        world = make_any_world("triton", SHAPE, np.full((3, 2, 2), 70), tiers=MEMORY_TIERS)
        q, k, v = (torch.cat([x, torch.full((padding, *x.shape[1:]), torch.nan)]) for x in world.step([0, 1, 2]))
        slots = np.arange(3, dtype=np.int32)
        part = world.backend.attend(world.backend.plan(slots, (Tier.HOST,), appends=False), 1, q, 0.25)
        return part, world.backend.decode(world.backend.plan(slots, (Tier.DEVICE,)), 1, q, k, v, 0.25, [part])

    (part, output), (part_alone, alone) = run(1), run(0)
    assert torch.equal(part.output[:3], part_alone.output)
    assert torch.equal(part.lse[:3], part_alone.lse)
    assert torch.equal(output[:3], alone)
    assert not output[3:].any()


def test_a_plan_is_good_until_the_next(make_any_world):
    world = make_any_world("triton", SHAPE, np.full((2, 2, 2), 40))
    plan = world.backend.plan(np.array([0], np.int32))
    world.backend.plan(np.array([1], np.int32))
    with pytest.raises(ValueError, match="a later one has taken its buffers"):
        world.backend.decode(plan, 0, *world.step([0]), 0.25)
    with pytest.raises(TypeError, match="must come from this backend"):
        world.backend.finish(SimpleNamespace())


@given(st.lists(st.integers(1, 5000), min_size=4, max_size=4), st.sampled_from([1, 2, 8]), st.sampled_from([1, 132]))
def test_items_cover_every_block_once(lengths, heads, multiprocessors):
    length = np.resize(np.array(lengths, np.int32), (2, 3, heads))  # [L, R, H]
    work = Work.of(length, multiprocessors)
    key = work.key()
    for layer in range(2):
        here = work.item_layer == layer
        items = work.items[here]
        assert np.array_equal(work.item_number[here], np.arange(len(items)))
        assert len(items) <= key.items
        covered = [(table, b) for table, first, count, _ in items for b in range(first, first + count)]
        blocks = -(-length[layer].ravel() // BLOCK_TOKENS)
        assert covered == [(table, b) for table, n in enumerate(blocks) for b in range(n)]
        entries = np.concatenate([np.arange(at, at + count) for _, _, count, at in items])
        assert np.array_equal(entries, np.arange(blocks.sum()))
        assert blocks.sum() <= key.entries
        for table, (first, count) in enumerate(work.spans[layer]):
            assert (items[first : first + count, 0] == table).all()


def test_splits_depend_on_the_table_alone():
    blocks = np.array([1, 8, 100, 264, 1000, 10000])
    together = split_blocks(blocks, 8, 132)
    assert [int(split_blocks(blocks[i : i + 1], 8, 132)[0]) for i in range(6)] == together.tolist()
    assert together.tolist() == [LEAST_SPLIT_BLOCKS] * 4 + [32, 512]
    assert (-(-blocks // together) <= 33).all()


@given(st.integers(1, 10**6))
def test_buckets_waste_a_quarter_at_most(n):
    assert n <= bucket_size(n) <= max(8, n * 1.25 + 8)


def test_auto_on_a_gpu():
    assert best_for((SimpleNamespace(device=torch.device("cuda")), SimpleNamespace(device=torch.device("cpu")))) == (
        "triton"
    )


def test_interpreter_refuses_other_devices():
    arenas = tuple(torch.zeros(256, dtype=torch.uint8, device="meta") for _ in MEMORY_TIERS)
    with pytest.raises(ValueError, match="interpreter reads RAM only"):
        make_backend("triton", SHAPE, arenas, Tables.allocate(1, SHAPE, 1))


def run_python(*arguments):
    """A process of its own, in which kernels are compiled instead of interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "protos"), environment.get("PYTHONPATH", "")])
    return subprocess.run([sys.executable, "-P", *arguments], env=environment, capture_output=True, text=True)


def test_backends_do_not_need_triton():
    check = "import sys; sys.modules['triton'] = None; import kernels.backends"
    done = run_python("-c", check)
    assert done.returncode == 0, done.stderr


def test_compiled_kernels_refuse_arenas_in_ram():
    check = """
import torch
from kernels.api import Tables
from kernels.backends import make_backend
from kernels.layout import CacheShape
shape = CacheShape(1, 1, 1, 64, torch.float32)
make_backend("triton", shape, (torch.zeros(256, dtype=torch.uint8),) * 2, Tables.allocate(1, shape, 1))
"""
    done = run_python("-c", check)
    assert "device arena on cpu: the triton backend needs a CUDA device" in done.stderr


@pytest.mark.slow
def test_compiled_kernels_cost_no_more_than_they_did():
    """Needs no GPU; ``triton_resources.py --write`` after a change that is meant to cost."""
    done = run_python(str(Path(__file__).with_name("triton_resources.py")))
    assert done.returncode == 0, done.stdout + done.stderr
