"""What the user asked for, as options of the client. The server judges it; only what cannot be sent is refused here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from cli.errors import BadInputError
from kvpilot.request import Options, make_request

Turn = tuple[str, str]
"""``(role, content)``."""


@dataclass(frozen=True)
class Order:
    """One generation; None and empty mean the server's default. The fields are those of ``kvpilot.request.Options``."""

    prompt: str = ""
    turns: tuple[Turn, ...] = ()
    """A conversation; used instead of the prompt where given."""
    model: str | None = None
    pipeline: str | None = None
    scenario: str | None = None
    max_divergence: float | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: Sequence[str] = ()
    ignore_eos: bool = False
    top_logprobs: int = 0
    session_id: str | None = None
    priority: str | None = None
    idempotency_key: str | None = None

    def options(self) -> Options:
        """What is set, for ``AsyncClient.generate``.

        Raises:
            BadInputError: a number that its field cannot carry, e.g. a negative seed.
        """
        options = Options()
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("prompt", "turns") or value is None or value == field.default:
                continue
            options[field.name] = value  # type: ignore[literal-required]
            try:
                make_request("", **{field.name: value})
            except ValueError as error:
                raise BadInputError(f"{field.name}: {error}") from None
        return options
