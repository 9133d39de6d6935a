"""Words and sentences for tasks that are made up: a haystack where no real text is given, names, and word lists."""

from __future__ import annotations

import random


def _words(text: str) -> list[str]:
    return text.split()


NOUNS = _words(
    """
    anchor apple autumn basket beacon bridge bronze bucket cabin candle canyon carpet castle cedar cellar chimney
    copper corner cotton cradle desert dinner engine feather fiddle forest fountain garden glacier goblet hammer
    harbor hazel island jacket kettle ladder lantern lemon library lumber marble meadow mirror mountain needle
    ocean orchard paddle parlor pebble pepper pillow planet pocket prairie puzzle quarry ribbon river saddle
    sailor shadow shelter silver spider spring station summer table temple thunder timber tunnel turnip valley
    velvet village violin wagon walnut water willow window winter wizard
    """
)
ADJECTIVES = _words(
    """
    ancient bitter brave bright broad calm careful clever cold common curious distant eager early empty faint
    famous fresh gentle golden grand heavy hidden hollow honest humble idle late little lonely loud lucky modest
    narrow noble odd pale patient plain polite proud quick quiet rapid rare rough simple slow small smooth solid
    steady strange strong subtle sudden sweet swift tall tender vast warm wide wild wise young
    """
)
_VERBS = _words(
    """
    answers borrows carries changes covers crosses delays draws finds follows gathers guards holds hides joins
    keeps leaves lifts marks meets mends moves needs passes reaches remembers repairs shapes shows sorts surrounds
    teaches turns visits watches
    """
)
_JOINTS = ("while", "because", "although", "whenever", "and yet", "long before", "so that")


def sentence(rng: random.Random) -> str:
    """One made-up sentence."""

    def clause() -> str:
        return (
            f"the {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)} {rng.choice(_VERBS)} "
            f"the {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"
        )

    said = clause() if rng.random() < 0.4 else f"{clause()} {rng.choice(_JOINTS)} {clause()}"
    return said[0].upper() + said[1:] + "."


def essay(rng: random.Random, characters: int) -> str:
    """Made-up prose of at least so many characters, in paragraphs."""
    paragraphs: list[str] = []
    size = 0
    while size < characters:
        paragraphs.append(" ".join(sentence(rng) for _ in range(rng.randint(3, 7))))
        size += len(paragraphs[-1]) + 2
    return "\n\n".join(paragraphs)


def compound(rng: random.Random) -> str:
    """A word pair that serves as a name, e.g. ``quiet-harbor``."""
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
