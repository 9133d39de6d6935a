"""The sampler against its definitions in plain Python, and its draws against the distribution they come from."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.engine.sampler import Choice, SampleRequest, SamplingParameters, sample

pytestmark = pytest.mark.usefixtures("one_torch_thread")

LOGITS = [2.0, 1.5, 0.5, 0.0, -0.5, 1.0, -3.0, 1.9]
DRAWS = 400
fixed = settings(derandomize=True, max_examples=40, deadline=None, database=None)


def draw(
    logits: list[float], parameters: SamplingParameters, index: int = 0, seen: tuple[int, ...] = (), top: int = 0
) -> Choice:
    return sample(torch.tensor([logits]), [SampleRequest(parameters, seen, index, top)])[0]


def draws(logits: list[float], parameters: SamplingParameters, count: int = DRAWS) -> Counter[int]:
    """Tokens of many indices, in one batch."""
    requests = [SampleRequest(parameters, (), index, 0) for index in range(count)]
    return Counter(choice.token_id for choice in sample(torch.tensor([logits] * count), requests))


def softmax(logits: dict[int, float]) -> dict[int, float]:
    weights = {token: math.exp(value - max(logits.values())) for token, value in logits.items()}
    return {token: weight / sum(weights.values()) for token, weight in weights.items()}


def distribution(logits: list[float], parameters: SamplingParameters, seen: tuple[int, ...] = ()) -> dict[int, float]:
    """Probability of every token that can be drawn: penalty, temperature, top-k, then min-p and top-p."""
    penalty = parameters.repetition_penalty
    scores = {token: float(torch.tensor(value)) for token, value in enumerate(logits)}
    for token in set(seen):
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    order = sorted(scores, key=lambda token: (-scores[token], token))
    order = order[: parameters.top_k or len(order)]
    shares = softmax({token: scores[token] / parameters.temperature for token in order})
    kept, before = {}, 0.0
    for token in order:
        if before < parameters.top_p and shares[token] >= parameters.min_p * shares[order[0]]:
            kept[token] = shares[token]
        before += shares[token]
    return {token: share / sum(kept.values()) for token, share in kept.items()}


def chi_square(observed: Counter[int], expected: dict[int, float]) -> float:
    count = sum(observed.values())
    return sum((observed[token] - count * share) ** 2 / (count * share) for token, share in expected.items())


def test_greedy_takes_the_most_likely_and_the_first_among_equals() -> None:
    assert draw(LOGITS, SamplingParameters()).token_id == 0
    assert draw([1.0, 3.0, 3.0], SamplingParameters()).token_id == 1
    assert draw([1.0, 3.0, 3.0], SamplingParameters(temperature=0.7, top_k=1)).token_id == 1


@pytest.mark.parametrize(
    ("parameters", "support"),
    [
        (SamplingParameters(temperature=1.0, top_k=3), {0, 7, 1}),
        (SamplingParameters(temperature=1.0, top_k=100), {0, 1, 2, 3, 4, 5, 6, 7}),
        (SamplingParameters(temperature=1.0, top_p=0.5), {0, 7}),
        (SamplingParameters(temperature=1.0, top_p=1e-9), {0}),
        (SamplingParameters(temperature=1.0, min_p=0.4), {0, 7, 1}),
        (SamplingParameters(temperature=0.5, min_p=0.4), {0, 7}),
        (SamplingParameters(temperature=2.0, min_p=0.4), {0, 7, 1, 5, 2}),
        (SamplingParameters(temperature=1.0, top_k=2, top_p=0.9, min_p=0.1), {0, 7}),
    ],
)
def test_only_tokens_of_the_support_are_drawn_and_all_of_them(parameters: SamplingParameters, support: set) -> None:
    assert set(distribution(LOGITS, parameters)) == support  # the definition agrees with the table above
    assert set(draws(LOGITS, parameters, 4000 if len(support) > 5 else DRAWS)) == support


@pytest.mark.parametrize(
    "parameters",
    [
        SamplingParameters(temperature=1.0, seed=1),
        SamplingParameters(temperature=1.0, seed=2**64 - 1),
        SamplingParameters(temperature=0.6, seed=3),
        SamplingParameters(temperature=1.7, top_k=5, seed=4),
        SamplingParameters(temperature=1.0, top_p=0.8, seed=5),
        SamplingParameters(temperature=1.2, min_p=0.2, top_p=0.95, seed=6),
    ],
)
def test_frequencies_over_the_indices_follow_the_distribution(parameters: SamplingParameters) -> None:
    expected = distribution(LOGITS, parameters)
    observed = draws(LOGITS, parameters, 4000)
    assert set(observed) <= set(expected)
    degrees = len(expected) - 1
    assert chi_square(observed, expected) < degrees + 4 * math.sqrt(2 * degrees)  # mean plus four deviations


logits_ = st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=12)
parameters_ = st.builds(
    SamplingParameters,
    temperature=st.floats(0.1, 2.0),
    top_p=st.floats(0.05, 1.0),
    top_k=st.integers(0, 14),
    min_p=st.floats(0, 0.9),
    repetition_penalty=st.floats(0.5, 2.0),
    seed=st.integers(0, 2**64 - 1),
)


@fixed
@given(logits=logits_, parameters=parameters_, index=st.integers(0, 10_000), data=st.data())
def test_whatever_is_asked_the_draw_is_one_of_the_support(logits, parameters, index, data) -> None:
    seen = tuple(data.draw(st.lists(st.integers(0, len(logits) - 1), min_size=1, max_size=6)))
    choice = draw(logits, parameters, index, seen)
    # A share exactly on a border may fall to either side: allow what a slightly wider rule would draw.
    wide = replace(parameters, top_p=parameters.top_p + 1e-5, min_p=parameters.min_p * (1 - 1e-5))
    ties = {token for token, value in enumerate(logits) if logits.count(value) > 1}
    assert choice.token_id in set(distribution(logits, wide, seen)) | ties


@fixed
@given(parameters=parameters_, index=st.integers(0, 2**40), place=st.integers(0, 5))
def test_a_draw_depends_on_seed_and_index_and_not_on_the_batch(parameters, index, place) -> None:
    alone = draw(LOGITS, parameters, index, (1, 2))
    others = [SampleRequest(SamplingParameters(temperature=1.0, seed=n), (0,), n, 3) for n in range(5)]
    requests = [*others[:place], SampleRequest(parameters, (1, 2), index, 0), *others[place:]]
    rows = torch.randn(6, len(LOGITS), generator=torch.Generator().manual_seed(0))
    rows[place] = torch.tensor(LOGITS)
    assert sample(rows, requests)[place] == alone == draw(LOGITS, parameters, index, (1, 2))


def test_other_seeds_and_other_indices_draw_other_tokens() -> None:
    uniform, one = [0.0] * 50, SamplingParameters(temperature=1.0, seed=1)
    by_index = [draw(uniform, one, index).token_id for index in range(60)]
    by_seed = [draw(uniform, replace(one, seed=seed)).token_id for seed in range(60)]
    shifted = [draw(uniform, replace(one, seed=2), index).token_id for index in range(60)]
    assert len(set(by_index)) > 25
    assert len(set(by_seed)) > 25
    assert sum(a == b for a, b in zip(by_index, shifted, strict=True)) < 8  # one in 50 by chance


def test_the_coldest_draws_are_greedy_and_huge_logits_are_no_trouble() -> None:
    assert set(draws(LOGITS, SamplingParameters(temperature=1e-3))) == {0}
    assert draws([3e4, -3e4, 2.9e4], SamplingParameters(temperature=0.01)) == Counter({0: DRAWS})
    hot = draws(LOGITS, SamplingParameters(temperature=1e6), 4000)
    assert chi_square(hot, dict.fromkeys(range(8), 1 / 8)) < 7 + 4 * math.sqrt(14)


def test_tokens_seen_are_penalised_once_each_whatever_their_sign() -> None:
    penalty = SamplingParameters(repetition_penalty=2.0)
    assert draw([2.0, 1.5, -1.0], penalty, seen=(0,)).token_id == 1  # 2 becomes 1
    assert draw([2.0, 1.5, -1.0], penalty, seen=(0, 0, 1, 1)).token_id == 0  # 1 and 0.75
    assert draw([-1.0, -1.5], penalty, seen=(0,)).token_id == 1  # -1 becomes -2
    assert draw([2.0, 1.5], replace(penalty, repetition_penalty=0.5), seen=(1,)).token_id == 1  # rewarded: 3
    drawn = Counter(
        draw(LOGITS, replace(penalty, temperature=1.0), index, (0, 4, 6)).token_id for index in range(DRAWS)
    )
    expected = distribution(LOGITS, replace(penalty, temperature=1.0), (0, 4, 6))
    large = {token: share for token, share in expected.items() if share * DRAWS > 5}
    assert chi_square(drawn, large) < len(large) + 4 * math.sqrt(2 * len(large))


@fixed
@given(logits=logits_, top=st.integers(0, 2))
def test_what_is_said_of_a_choice_is_of_the_unmodified_distribution(logits, top) -> None:
    choice = draw(logits, SamplingParameters(temperature=1.3, top_k=2, repetition_penalty=1.5), 7, (0, 1), top)
    shares = softmax({token: float(value) for token, value in enumerate(logits)})
    entropy = -sum(share * math.log(share) for share in shares.values() if share)
    assert choice.entropy == pytest.approx(entropy, abs=1e-4)
    assert choice.top1_probability == pytest.approx(max(shares.values()), abs=1e-5)
    if not top:
        assert choice.logprob is None
        assert choice.top == ()
        return
    assert choice.logprob == pytest.approx(math.log(shares[choice.token_id]), abs=1e-4)
    assert [value for _, value in choice.top] == pytest.approx(
        sorted((math.log(share) for share in shares.values()), reverse=True)[:top], abs=1e-4
    )
    assert all(value == pytest.approx(math.log(shares[token]), abs=1e-4) for token, value in choice.top)


def test_tokens_that_a_model_rules_out_do_not_spoil_the_entropy() -> None:
    choice = draw([0.0, 0.0, -math.inf], SamplingParameters(), top=1)
    assert choice.entropy == pytest.approx(math.log(2))
    assert choice.top1_probability == pytest.approx(0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_sampled_in_float(dtype: torch.dtype) -> None:
    requests = [SampleRequest(SamplingParameters(temperature=1.0, seed=1), (), n, 1) for n in range(50)]
    rows = torch.tensor([LOGITS] * 50)
    exact = torch.tensor([LOGITS] * 50).to(dtype).float()
    assert sample(rows.to(dtype), requests) == sample(exact, requests)
