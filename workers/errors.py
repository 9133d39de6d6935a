"""The one exception that carries a refusal from the worker's inside to its wire."""

from __future__ import annotations

from kvpilot.v1 import common_pb2

INVALID_ARGUMENT = 3
DEADLINE_EXCEEDED = 4
NOT_FOUND = 5
RESOURCE_EXHAUSTED = 8
FAILED_PRECONDITION = 9
ABORTED = 10
INTERNAL = 13


class ProblemError(Exception):
    """A request or directive is refused; ``problem`` is what the other side is told."""

    def __init__(self, code: int, message: str, violations: dict[str, str] | None = None, retry_after_ms: int = 0):
        super().__init__(message)
        self.problem = common_pb2.Problem(code=code, message=message, retry_after_ms=retry_after_ms)
        for field, description in (violations or {}).items():
            self.problem.violations.add(field=field, description=description)
