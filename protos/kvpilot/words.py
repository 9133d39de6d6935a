"""The API's enumerations in small words, as metrics, logs and traces have them."""

from __future__ import annotations

from kvpilot.v1 import common_pb2, generation_pb2


def reason_word(reason: generation_pb2.FinishReason) -> str:
    """How a job ended, e.g. ``stop_token``."""
    return _word(generation_pb2.FinishReason, reason, "FINISH_REASON_")


def orderer_word(orderer: common_pb2.Orderer) -> str:
    """Who ordered a switch, e.g. ``controller``."""
    return _word(common_pb2.Orderer, orderer, "ORDERER_")


def cause_word(cause: common_pb2.Cause) -> str:
    """What a switch is for, e.g. ``pressure``; ``other`` where that is not said."""
    return _word(common_pb2.Cause, cause, "CAUSE_") if cause else "other"


def loss_class_word(loss_class: common_pb2.LossClass) -> str:
    """What a pipeline loses, e.g. ``recoverable``."""
    return _word(common_pb2.LossClass, loss_class, "LOSS_CLASS_")


def _word(kind: object, value: int, prefix: str) -> str:
    """A value's name without its prefix; ``other`` for one that a newer version has."""
    names = {number: name for name, number in kind.items()}  # type: ignore[attr-defined]
    return str(names.get(value, f"{prefix}OTHER")).removeprefix(prefix).lower()
