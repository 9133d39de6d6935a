"""Choosing a backend, and what all of them refuse."""

import threading

import numpy as np
import pytest
import torch
from numba.core.caching import IndexDataCacheFile

from kernels import cpu_attend, cpu_jit
from kernels.api import Tables
from kernels.backends import make_backend
from kernels.cpu import CpuBackend
from kernels.cpu_threads import team
from kernels.layout import MEMORY_TIERS, CacheShape, Format
from kernels.reference import ReferenceBackend

SHAPE = CacheShape(1, 1, 1, 64, torch.float32)


def arenas(*sizes, device="cpu"):
    return tuple(torch.zeros(size, dtype=torch.uint8, device=device) for size in sizes)


@pytest.mark.parametrize(
    ("name", "expected"), [("auto", CpuBackend), ("cpu", CpuBackend), ("reference", ReferenceBackend)]
)
def test_by_name(name, expected):
    assert type(make_backend(name, SHAPE, arenas(256, 256), Tables.allocate(1, SHAPE, 1))) is expected


def test_auto_leaves_the_cpu_backend_to_arenas_in_ram():
    elsewhere = arenas(256, 256, device="meta")
    tables = Tables.allocate(1, SHAPE, 1)
    assert type(make_backend("auto", SHAPE, elsewhere, tables)) is ReferenceBackend
    with pytest.raises(ValueError, match="in RAM only"):
        make_backend("cpu", SHAPE, elsewhere, tables)


def test_unknown_name():
    with pytest.raises(ValueError, match="'gpu': must be one of auto, cpu, reference"):
        make_backend("gpu", SHAPE, arenas(256, 256), Tables.allocate(1, SHAPE, 1))


@pytest.mark.parametrize(
    "wrong", [arenas(256), arenas(256, 255), (torch.zeros(256), torch.zeros(256)), (arenas(512)[0][::2],) * 2]
)
def test_arenas_are_checked(name, wrong):
    with pytest.raises(ValueError, match="arena"):
        make_backend(name, SHAPE, wrong, Tables.allocate(1, SHAPE, 1))


def test_warm_up(make_world):
    make_world(SHAPE, np.full((1, 1, 1), 3)).backend.warm_up()


def test_warm_up_compiles_for_all_shapes(make_any_world):
    """Every kernel has one variant, whatever the dtype and the sizes."""
    for dtype in (torch.float32, torch.bfloat16):
        world = make_any_world(
            "cpu", CacheShape(2, 2, 4, 80, dtype), np.full((2, 2, 2), 70), tuple(Format), MEMORY_TIERS
        )
        plan = world.backend.plan(np.arange(2, dtype=np.int32))
        world.backend.decode(plan, 1, *world.step([0, 1]), 1.0)
    world.backend.warm_up()
    assert len(cpu_attend.attend.signatures) == 1


def test_cache_notices_every_source():
    assert cpu_attend.attend._cache._cache_file._source_stamp == cpu_jit._SOURCES


def test_processes_that_compile_at_once_keep_each_others_variants(tmp_path):
    """Each has a cache file object of its own, here one a thread: to the lock, all are strangers."""
    files = [IndexDataCacheFile(str(tmp_path), "function", "stamp") for _ in range(8)]
    together = threading.Barrier(len(files))

    def compile_one(number, file):
        cpu_jit.share(file)
        together.wait()
        file.save(f"variant {number}", f"code {number}")

    threads = [threading.Thread(target=compile_one, args=one) for one in enumerate(files)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [files[0].load(f"variant {number}") for number in range(8)] == [f"code {number}" for number in range(8)]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_thread_count_changes_nothing(make_any_world, threads):
    def run():
        world = make_any_world(
            "cpu", CacheShape(1, 2, 6, 64, torch.float32), np.full((2, 1, 2), 1300), tuple(Format), MEMORY_TIERS
        )
        return world.backend.decode(world.backend.plan(np.array([0, 1], np.int32)), 0, *world.step([0, 1]), 0.125)

    alone = run()  # tests have one thread unless they say otherwise
    torch.set_num_threads(threads)
    assert team()[-1] in (1, threads)
    assert torch.equal(run(), alone)


def test_engines_side_by_side(make_any_world):
    """Backends of one process may be used from several Python threads at once."""
    results = {}

    def run(name):
        torch.set_num_threads(2)
        world = make_any_world("cpu", CacheShape(1, 2, 6, 64, torch.float32), np.full((1, 1, 2), 1300), tuple(Format))
        plan = world.backend.plan(np.array([0], np.int32))
        q, k, v = world.step([0])
        results[name] = [world.backend.decode(plan, 0, q, k, v, 0.125) for _ in range(5)]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first = results[0][0]
    assert all(torch.equal(output, first) for outputs in results.values() for output in outputs)
