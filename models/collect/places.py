"""Where to measure a text, and what is in force meanwhile. Pure: the same text and name give the same places."""

from __future__ import annotations

import math
import random
from collections.abc import Container, Sequence

from models.candidates import FULL

LEAST_TOKENS = 64
"""Tokens before the first place."""
_TOKENS_A_PLACE = 512


def places_of(tokens: int) -> int:
    """How many places a text of so many tokens has unless told otherwise: 2 to 4."""
    return max(2, min(4, 1 + tokens // _TOKENS_A_PLACE))


def anywhere(tokens: int, count: int, horizon: int, rng: random.Random, taken: Container[int] = ()) -> list[int]:
    """Places spread over a text: one at random in each of ``count`` equal parts of what can be measured.

    Args:
        tokens: of the text.
        count: places wanted; there are fewer where they would lie less than a horizon apart.
        horizon: tokens behind each place.
        rng: chooses.
        taken: places not to use.

    Returns:
        Rising; each at least ``LEAST_TOKENS`` and at most ``tokens - horizon``; empty where the text is too short.
    """
    room = tokens - horizon - LEAST_TOKENS + 1
    if room < 1:
        return []
    count = max(1, min(count, math.ceil(room / (2 * horizon))))
    width = room / count
    found = []
    for part in range(count):
        begin = LEAST_TOKENS + math.ceil(part * width)
        end = LEAST_TOKENS + math.ceil((part + 1) * width) - (horizon if part < count - 1 else 0)
        choices = [place for place in range(begin, max(begin + 1, end)) if place not in taken]
        if choices:
            found.append(rng.choice(choices))
    return found


def around(
    prompt: int, continuation: int, count: int, horizon: int, rng: random.Random, task: bool = False
) -> list[int]:
    """Places of a prompt and what follows it: before the first token of the continuation; one earlier, inside the
    prompt; then, unless it is a task, one later; then more inside the prompt.

    Args:
        prompt: tokens of it.
        continuation: tokens of it. Fewer than a horizon: the place moves forward, so that they end the horizon.
        count: places wanted, if there is room.
        horizon: tokens behind each place.
        rng: chooses.
        task: only the beginning of the continuation counts.
    """
    boundary = min(prompt, prompt + continuation - horizon)
    if boundary < LEAST_TOKENS:
        return []
    found = [boundary]
    if count > 1 and not task and continuation >= 3 * horizon:
        found.append(rng.randint(prompt + horizon, prompt + continuation - horizon))
    earlier = max(0, count - len(found)) if not task else min(1, count - 1)
    return sorted({*anywhere(boundary, earlier, horizon, rng), *found} if earlier else found)


def in_force(places: Sequence[int], others: Sequence[str], rng: random.Random) -> list[str]:
    """A pipeline per place: ``full`` at half of them (the odd one by chance), else one of ``others``."""
    lossy = len(places) // 2 + (rng.randrange(2) if len(places) % 2 else 0)
    chosen = set(rng.sample(range(len(places)), lossy)) if others else set()
    return [rng.choice(list(others)) if place in chosen else FULL for place in range(len(places))]
