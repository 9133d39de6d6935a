"""The demo's jobs: a long document with a fact in it, a chat of three turns, a long stream, and code."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from cli.errors import FailedError
from cli.order import Order

FACT_ANSWER = "7391-2846-5170-9425-6038-1527-8894-3316"
"""Long enough (40 tokens) that its end is read from the cache after a switch in the middle of the answer."""
FACT = f"The access code of the northern archive is {FACT_ANSWER}."
FACT_QUESTION = "What is the access code of the northern archive?"
FACT_PLACE = 0.5
"""Where in the document the fact stands, as a share of its paragraphs."""


@dataclass(frozen=True)
class DemoJob:
    """One of the jobs that are submitted at once; a chat's turns follow one another."""

    name: str
    what: str
    orders: tuple[Order, ...]
    """One per turn. Each is the user's turn only; the conversation so far is put before it."""
    answer: str | None = None
    """What the generated text must contain."""


def demo_jobs() -> tuple[DemoJob, ...]:
    """All of them; greedy or with a fixed seed, so that runs on one machine differ only by when a switch comes."""
    document = f"{long_document()}\n\n{FACT_QUESTION}"
    turns = (
        "I want to grow tomatoes on my balcony. What do I need?",
        "How often should I water them?",
        "Thank you. Please sum up what I have to do in a few sentences.",
    )
    code = "Write a Python function that returns the n-th Fibonacci number, with a docstring and two examples."
    story = "Once upon a time there was a lighthouse keeper who wrote down every ship that passed. "
    return (
        DemoJob(
            "document",
            "a long text, a fact in its middle, a question at its end",
            (Order(turns=(("user", document),), scenario="long-context", max_tokens=96),),
            FACT_ANSWER,
        ),
        DemoJob(
            "chat",
            "three turns in one session",
            tuple(
                Order(turns=(("user", turn),), scenario="multi-turn", max_tokens=80, session_id="demo-chat")
                for turn in turns
            ),
        ),
        DemoJob(
            "stream",
            "a story longer than the window that matters",
            (
                Order(
                    prompt=story,
                    scenario="streaming",
                    max_tokens=352,
                    temperature=0.8,
                    top_p=0.95,
                    seed=7,
                    ignore_eos=True,
                ),
            ),
        ),
        DemoJob("code", "a small program", (Order(turns=(("user", code),), max_tokens=128),)),
    )


def long_document() -> str:
    """About 2,100 tokens of real text, our licence, with the fact as a paragraph of its own."""
    paragraphs = [" ".join(part.split()) for part in licence_text().split("\n\n") if part.strip()]
    paragraphs.insert(int(len(paragraphs) * FACT_PLACE), FACT)
    return "\n\n".join(paragraphs)


def licence_text() -> str:
    """kvpilot's licence: from the checkout, else from the installed package."""
    checkout = Path(__file__).resolve().parent.parent / "LICENSE"
    if checkout.is_file():
        return checkout.read_text(encoding="utf-8")
    try:
        packaged = metadata.distribution("kvpilot").read_text("licenses/LICENSE")
    except metadata.PackageNotFoundError:
        packaged = None
    if not packaged:
        raise FailedError("the demo's document, kvpilot's LICENSE file, is neither in the checkout nor in the package")
    return packaged
