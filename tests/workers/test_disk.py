"""The disk tier's files: what comes back is what was written, or an error."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from workers.cache.disk import CorruptBlockError, DiskFullError, DiskStore

BLOCK_BYTES = 768


def some_blocks(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, BLOCK_BYTES), np.uint8)


@pytest.fixture
def store(tmp_path):
    store = DiskStore(tmp_path, 1 << 20)
    yield store
    store.close()


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.blocks"))


def test_what_comes_back_is_what_was_written(store):
    batches = [(store.write(some_blocks(count, count)), some_blocks(count, count)) for count in (1, 7, 64)]
    for batch, blocks in batches:
        np.testing.assert_array_equal(store.read(batch).result(), blocks)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(wanted=st.lists(st.integers(0, 19), max_size=30))
def test_some_blocks_in_any_order(store, wanted):
    batch = store.write(some_blocks(20))
    np.testing.assert_array_equal(store.read(batch, np.array(wanted, int)).result(), some_blocks(20)[wanted])
    store.free(batch)


def test_bytes_are_those_of_the_files(store, tmp_path):
    batches = [store.write(some_blocks(count)) for count in (3, 5)]
    for batch in batches:
        batch.written.result()
    assert store.used_bytes == sum(path.stat().st_size for path in files(tmp_path)) == sum(b.nbytes for b in batches)
    assert store.counts.written_bytes == store.used_bytes
    store.read(batches[0]).result()
    assert store.counts.read_bytes == 3 * BLOCK_BYTES
    for batch in batches:
        store.free(batch)
    assert store.used_bytes == 0
    assert not files(tmp_path)


def test_no_more_than_the_budget(store):
    fits = store.budget_bytes // (100 * BLOCK_BYTES)
    held = [store.write(some_blocks(100)) for _ in range(fits)]
    with pytest.raises(DiskFullError, match="of 1048576 free"):
        store.write(some_blocks(100))
    assert store.used_bytes <= store.budget_bytes
    store.free(held[0])
    held[0].written.result()
    store.write(some_blocks(100)).written.result()


FULL_FILE_SYSTEM = """
import resource, sys
from pathlib import Path
import numpy as np
from workers.cache.disk import DiskStore
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
store, blocks = DiskStore(Path(sys.argv[1]), 1 << 20), np.ones((100, 768), np.uint8)
print(store.write(blocks).written.exception(), store.used_bytes, len(list(Path(sys.argv[1]).rglob("*.blocks"))))
print((store.read(store.write(blocks[:5])).result() == blocks[:5]).all())
store.close()
"""


def test_a_file_system_that_is_full(tmp_path):
    """A file may not grow beyond a limit of the process: the system's answer is as that of a full disk."""
    ran = subprocess.run([sys.executable, "-c", FULL_FILE_SYSTEM, str(tmp_path)], capture_output=True, text=True)
    why, works = ran.stdout.splitlines()
    assert why.endswith("File too large 0 0"), ran
    assert works == "True"


def test_every_flipped_byte_is_noticed(store, tmp_path):
    blocks = some_blocks(3)
    batch = store.write(blocks)
    batch.written.result()
    [path] = files(tmp_path)
    good = path.read_bytes()
    data_at = len(good) - blocks.size
    for at in [*range(data_at), data_at, data_at + BLOCK_BYTES + 1, len(good) - 1]:
        damaged = bytearray(good)
        damaged[at] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(CorruptBlockError) as error:
            store.read(batch).result()
        assert error.value.blocks == ([0, 1, 2] if at < data_at else [(at - data_at) // BLOCK_BYTES])
    path.write_bytes(good)
    np.testing.assert_array_equal(store.read(batch).result(), blocks)


def test_undamaged_blocks_of_a_damaged_file_can_be_read(store, tmp_path):
    batch = store.write(some_blocks(3))
    batch.written.result()
    [path] = files(tmp_path)
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 128
    path.write_bytes(damaged)
    np.testing.assert_array_equal(store.read(batch, np.array([1, 0])).result(), some_blocks(3)[[1, 0]])
    assert store.counts.corrupt_blocks == 0


@pytest.mark.parametrize("length", [0, 10, 40, 1000])
def test_a_file_cut_short_or_gone(store, tmp_path, length):
    batch = store.write(some_blocks(3))
    batch.written.result()
    [path] = files(tmp_path)
    os.truncate(path, length)
    with pytest.raises(CorruptBlockError, match=r"too short|damaged"):
        store.read(batch).result()
    path.unlink()
    with pytest.raises(CorruptBlockError):
        store.read(batch).result()
    store.free(batch)
    assert store.used_bytes == 0


HANGS = """
import signal, sys
from pathlib import Path
import numpy as np
from workers.cache.disk import DiskStore
store = DiskStore(Path(sys.argv[1]), 1 << 20)
store.write(np.ones((4, 768), np.uint8)).written.result()
print("written", flush=True)
signal.pause()
"""


def test_files_of_a_killed_process_go(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HANGS, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"written\n"
    alive = DiskStore(tmp_path, 1 << 20)
    assert len(files(tmp_path)) == 1, "a live process's files stay"
    process.kill()
    process.communicate()
    after = DiskStore(tmp_path, 1 << 20)
    assert not files(tmp_path)
    kept = alive.write(some_blocks(2))
    np.testing.assert_array_equal(alive.read(kept).result(), some_blocks(2))
    for store in (alive, after):
        store.close()
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_batch_that_is_freed_while_it_is_read_is_read_to_the_end(tmp_path):
    store = DiskStore(tmp_path, 64 << 20)
    batches = [store.write(some_blocks(4000, seed)) for seed in range(4)]
    reads = [store.read(batch) for batch in batches]  # more than there are threads: some have not begun
    for batch in batches:
        store.free(batch)
    for seed, read in enumerate(reads):
        np.testing.assert_array_equal(read.result(), some_blocks(4000, seed))
    store.close()
    assert store.counts.corrupt_blocks == store.used_bytes == 0
