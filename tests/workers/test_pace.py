"""How slices of switches are sized."""

from __future__ import annotations

import pytest

from kernels.layout import Format, Tier
from workers.cache.preparation import Slice
from workers.engine.pace import FIRST_BYTES_PER_S, FIRST_STEP_MS, Pace

INT8 = (Tier.DEVICE, Format.INT8)
COPY = (Tier.HOST, Format.RAW)


def pace(share: float = 0.25, least_blocks: int = 10) -> Pace:
    return Pace(share, least_blocks, raw_block_bytes=2000)


def test_before_anything_is_measured_it_goes_by_guesses() -> None:
    block_ms = 2000 / FIRST_BYTES_PER_S * 1e3
    assert pace().most(*INT8) == int(0.25 * FIRST_STEP_MS / block_ms)


def test_a_slice_takes_its_share_of_a_step() -> None:
    one = pace()
    for _ in range(3):
        one.stepped(40.0)
    one.built(Slice(*INT8, 100), 5.0)  # 0.05 ms a block
    one.built(Slice(*COPY, 100), 1.0)
    assert one.budget_ms == 10.0
    assert (one.most(*INT8), one.most(*COPY)) == (200, 1000)
    assert one.fits({INT8: 100, COPY: 500})
    assert not one.fits({INT8: 101, COPY: 500})


def test_a_hiccup_and_a_small_slice_change_nothing() -> None:
    one = pace()
    for duration_ms in (40.0, 41.0, 900.0):
        one.stepped(duration_ms)
    one.built(Slice(*INT8, 9), 90.0)
    for duration_ms in (5.0, 5.0, 500.0):
        one.built(Slice(*INT8, 100), duration_ms)
    assert one.budget_ms == pytest.approx(41.0 / 4)
    assert one.most(*INT8) == 205


def test_a_slice_has_its_least_blocks_whatever_they_take() -> None:
    one = pace(share=0.0)
    assert one.most(*INT8) == one.most(*COPY) == 10
    assert one.fits({INT8: 5, COPY: 5})
    assert not one.fits({INT8: 11})
    assert one.fits({})
