"""Which values of a stage's parameter are accepted: declared by the stage, checked by worker and controller alike."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvpilot.pipeline import Value, format_value, parse_value
from kvpilot.v1 import generation_pb2


@dataclass(frozen=True)
class Bounds:
    """The values that meet every condition that is set; a value that is no number meets ``choices`` only.

    >>> str(Bounds(above=0, most=1)), Bounds(above=0, most=1).accept(1.5)
    ('more than 0, at most 1', False)
    """

    least: float | None = None
    above: float | None = None
    most: float | None = None
    step: float | None = None
    """From ``least``, which must be given with it."""
    choices: tuple[Value, ...] = ()

    def accept(self, value: Value) -> bool:
        """Whether the value is accepted; NaN and infinities never are."""
        if self.choices and not any(type(value) is type(choice) and value == choice for choice in self.choices):
            return False
        if isinstance(value, bool | str):
            return self == Bounds(choices=self.choices)
        return (
            math.isfinite(value)
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.step is None or self.least is None or (value - self.least) % self.step == 0)
        )

    def __str__(self) -> str:
        words = []
        if self.choices:
            words.append(" or ".join(format_value(choice) for choice in self.choices))
        if self.step is not None and self.least is not None:
            words.append(f"{self.least:g}, {self.least + self.step:g}, {self.least + 2 * self.step:g} and so on")
        elif self.least is not None:
            words.append(f"at least {self.least:g}")
        if self.above is not None:
            words.append(f"more than {self.above:g}")
        if self.most is not None:
            words.append(f"at most {self.most:g}")
        return ", ".join(words) or "any value of its type"

    def to_proto(self) -> generation_pb2.ParameterBounds:
        """The API's form."""
        return generation_pb2.ParameterBounds(
            least=self.least,
            above=self.above,
            most=self.most,
            step=self.step,
            choices=[format_value(choice) for choice in self.choices],
        )

    @classmethod
    def from_proto(cls, message: generation_pb2.ParameterBounds) -> Bounds:
        """From the API's form.

        Raises:
            PipelineError: a choice that is no value of pipeline text.
        """

        def number(field: str) -> float | None:
            return getattr(message, field) if message.HasField(field) else None

        return cls(
            least=number("least"),
            above=number("above"),
            most=number("most"),
            step=number("step"),
            choices=tuple(parse_value(choice) for choice in message.choices),
        )


ANY = Bounds()
TRUTH = Bounds(choices=(True, False))
