"""What controllers know of bundles, as operators are told it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from controller.bundles import BundleHolder
from controller.guard import Guard
from kvpilot.v1 import operator_pb2


def bundles_of(holder: BundleHolder | None, guard: Guard | None) -> list[operator_pb2.Bundle]:
    """What this controller knows: the active one, the shadow, those refused, and then those that were active before."""
    if holder is None or guard is None:
        return []
    held = {predictor.version: predictor for predictor in (holder.active, holder.shadow) if predictor is not None}
    audited = {version for version, _ in guard.audits}
    bundles = []
    for version in dict.fromkeys([*held, *sorted(holder.refused), *sorted(audited)]):
        bundle = operator_pb2.Bundle(
            version=version,
            active=holder.active is not None and holder.active.version == version,
            shadow=holder.shadow is not None and holder.shadow.version == version,
            refusal=holder.refused.get(version, ""),
            audits=sum(count for (of, _), count in guard.audits.items() if of == version),
            exceeded=sum(count for (of, _), count in guard.exceeded.items() if of == version),
            alarms=guard.alarms[version],
            drifts=guard.drifts[version],
            mean_log_residual=guard.residual(version),
        )
        if version in held:
            bundle.alpha = held[version].alpha
        bundles.append(bundle)
    return bundles


def merged(
    own: Iterable[operator_pb2.Bundle], others: Mapping[str, Iterable[operator_pb2.Bundle]]
) -> list[operator_pb2.Bundle]:
    """Each bundle once, with the audits of all controllers.

    Args:
        own: what the controller that is asked knows.
        others: the same of the others, by their names.
    """
    told = [("", list(own)), *((name, list(others[name])) for name in sorted(others))]
    found: dict[str, operator_pb2.Bundle] = {}
    for name, bundles in told:
        for bundle in bundles:
            known = found.setdefault(bundle.version, operator_pb2.Bundle(version=bundle.version))
            _add(known, bundle, f"controller {name}: " if name else "")
    return sorted(found.values(), key=lambda bundle: (not bundle.active, not bundle.shadow))


def _add(known: operator_pb2.Bundle, bundle: operator_pb2.Bundle, whose: str) -> None:
    known.active |= bundle.active
    known.shadow |= bundle.shadow
    known.alpha = known.alpha or bundle.alpha
    if bundle.refusal and not known.refusal:
        known.refusal = whose + bundle.refusal
    if bundle.HasField("mean_log_residual"):
        sums = known.mean_log_residual * known.audits + bundle.mean_log_residual * bundle.audits
        known.mean_log_residual = sums / (known.audits + bundle.audits)
    for name in ("audits", "exceeded", "alarms", "drifts"):
        setattr(known, name, getattr(known, name) + getattr(bundle, name))
