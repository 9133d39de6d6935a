"""Attention in parts, merged."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.partials import Partial, merge


def test_merge():
    g = torch.Generator().manual_seed(0)
    lse = torch.tensor([0.0, 1.0, -1.0, 1e8, 1e8, -1e30, 3e38, -torch.inf, -torch.inf])
    other = torch.tensor([0.0, -1.0, 30.0, 1e8, -1e8, 1e30, -3e38, 2.0, -torch.inf])
    parts = [Partial(torch.randn(len(lse), 1, 8, generator=g), x[:, None]) for x in (lse, other)]
    merged = merge(parts)
    most = torch.maximum(lse, other).double()
    powers = [torch.where(x == -torch.inf, 0.0, (x.double() - most).exp()) for x in (lse, other)]
    wanted = sum(power[:, None, None] * part.output.double() for power, part in zip(powers, parts, strict=True))
    total = powers[0] + powers[1]
    wanted[:-1] /= total[:-1, None, None]
    torch.testing.assert_close(merged.output.double(), wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(merged.lse[:, 0].double(), most + total.log(), rtol=1e-6, atol=1e-6)
    assert not merged.output[-1].any()


@given(st.lists(st.floats(-100, 100, width=32) | st.just(-float("inf")), min_size=3, max_size=6))
def test_merge_in_any_grouping(lses):
    g = torch.Generator().manual_seed(1)
    parts = [Partial(torch.randn(1, 1, 4, generator=g), torch.tensor([[lse]])) for lse in lses]
    whole, grouped = merge(parts), merge([merge(parts[1:]), parts[0]])
    torch.testing.assert_close(whole.output, grouped.output, rtol=0, atol=1e-4)
    torch.testing.assert_close(whole.lse, grouped.lse, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    ("output", "lse", "message"),
    [
        (torch.zeros(1, 2, 4, dtype=torch.float16), torch.zeros(1, 2), "output: torch.float16"),
        (torch.zeros(1, 2, 4), torch.zeros(1, 2).double(), "lse: torch.float64"),
        (torch.zeros(2, 4), torch.zeros(1, 2), r"output: torch.float32 \(2, 4\), must be float32 with 3 dimensions"),
        (torch.zeros(1, 2, 4), torch.zeros(1, 3), r"lse: \(1, 3\), must be \(1, 2\)"),
    ],
)
def test_partial_refuses(output, lse, message):
    with pytest.raises(ValueError, match=message):
        Partial(output, lse)


def test_merge_refuses_nothing():
    with pytest.raises(ValueError, match="parts: got none"):
        merge([])
