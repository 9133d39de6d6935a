"""How numbers and protos are spelled for people: sizes, shares, times, names of enum values."""

from __future__ import annotations

import math

from kvpilot.v1 import common_pb2, generation_pb2, operator_pb2, policy_pb2

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def size(count: float) -> str:
    """Bytes as people write them, e.g. ``12.4 MiB``."""
    for unit in _UNITS:
        if abs(count) < 1024 or unit == _UNITS[-1]:
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


def share(part: float, whole: float) -> str:
    """A part of a whole in percent, ``-`` of nothing."""
    return f"{part / whole:.0%}" if whole else "-"


def count(number: int, noun: str) -> str:
    """A number of things, e.g. ``1 worker``, ``2 workers``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def nats(value: float) -> str:
    """A divergence in two digits, e.g. ``0.0041``."""
    return f"{value:.2g}"


def short_id(job_id: str) -> str:
    """The end of a long job id, enough to tell live jobs apart."""
    return job_id if len(job_id) <= 12 else f"…{job_id[-11:]}"


def orderer(value: common_pb2.Orderer) -> str:
    """``client``, ``controller``, ``operator`` or ``worker``."""
    return _word(common_pb2.Orderer.Name(value), "ORDERER_")


def mode(value: operator_pb2.Mode) -> str:
    """``off``, ``advisory`` or ``active``."""
    return _word(operator_pb2.Mode.Name(value), "MODE_")


def outcome(value: operator_pb2.DecisionOutcome) -> str:
    """``keep``, ``advised``, ``sent``, ``applied`` or ``refused``."""
    return _word(operator_pb2.DecisionOutcome.Name(value), "DECISION_OUTCOME_")


def loss_class(value: common_pb2.LossClass) -> str:
    """``exact``, ``recoverable`` or ``permanent``."""
    return _word(common_pb2.LossClass.Name(value), "LOSS_CLASS_")


def bundle(value: operator_pb2.Bundle) -> str:
    """A bundle in a line: its part, and what a controller's audits say of it."""
    roles = [word for word, held in (("active", value.active), ("shadow", value.shadow)) if held]
    name = f"bundle {value.version} ({', '.join(roles) or ('refused' if value.refusal else 'not in use')})"
    if value.refusal:
        return f"{name}: {value.refusal}"
    if not value.audits:
        return f"{name}: no audits" if value.active else name
    promised = f", {value.alpha:.0%} promised" if value.alpha else ""
    said = [
        f"{count(value.audits, 'audit')}, {value.exceeded} above their bound"
        f" ({share(value.exceeded, value.audits)}{promised})"
    ]
    if value.HasField("mean_log_residual"):
        said.append(f"measured {math.exp(value.mean_log_residual):.2g} times what was predicted")
    said += [count(value.drifts, "drift"), count(value.alarms, "alarm")]
    return f"{name}: {', '.join(said)}"


def recalls(value: policy_pb2.Recalls) -> str:
    """What was asked of lower tiers and moved between tiers, in a line; empty where nothing was."""
    said = [
        f"{share(_in_time(tier), _asked(tier))} of {count(_asked(tier), 'block')} asked of {tier.name} there in time"
        for tier in value.tiers
    ]
    pairs = [pair for pair in value.moved if pair.from_tier != pair.to_tier]
    moved = [f"{pair.from_tier} → {pair.to_tier} {size(pair.bytes)}" for pair in pairs]
    said += [f"moved {', '.join(moved)}"] if moved else []
    if choice := value.read_blocks + value.skipped_blocks:
        said.append(f"queries read {share(value.read_blocks, choice)} of the blocks they may skip")
    return "; ".join(said)


def in_time(value: policy_pb2.Recalls) -> str:
    """The share of the blocks asked of lower tiers that were there in time, ``-`` where none was asked for."""
    return share(sum(map(_in_time, value.tiers)), sum(map(_asked, value.tiers)))


def _asked(tier: policy_pb2.TierRecalls) -> int:
    return _in_time(tier) + int(tier.waited_blocks + tier.in_place_blocks)


def _in_time(tier: policy_pb2.TierRecalls) -> int:
    return int(tier.there_blocks + tier.ahead_blocks)


def finish_reason(value: generation_pb2.FinishReason) -> str:
    """``stop_token``, ``length``, ..."""
    return str(generation_pb2.FinishReason.Name(value)).removeprefix("FINISH_REASON_").lower()


def _word(name: str, prefix: str) -> str:
    return name.removeprefix(prefix).lower().replace("_", "-")
