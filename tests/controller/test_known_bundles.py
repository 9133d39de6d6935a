"""What several controllers know of bundles, told as one."""

from __future__ import annotations

import pytest

from controller.known_bundles import merged
from kvpilot.v1.operator_pb2 import Bundle


def test_audits_of_all_controllers_are_added_up() -> None:
    own = [
        Bundle(version="v2", active=True, alpha=0.1, audits=30, exceeded=2, alarms=1, mean_log_residual=0.5),
        Bundle(version="v1", audits=5),
    ]
    other = [
        Bundle(version="v2", active=True, alpha=0.1, audits=10, exceeded=3, drifts=2, mean_log_residual=-0.5),
        Bundle(version="v3", shadow=True, alpha=0.2),
    ]
    two, three, one = merged(own, {"b": other, "c": []})
    assert (two.version, two.active, two.alpha) == ("v2", True, pytest.approx(0.1))
    assert (two.audits, two.exceeded, two.alarms, two.drifts) == (40, 5, 1, 2)
    assert two.mean_log_residual == pytest.approx((30 * 0.5 - 10 * 0.5) / 40)
    assert (three.version, three.shadow) == ("v3", True)
    assert (one.version, one.audits, one.HasField("mean_log_residual")) == ("v1", 5, False)


def test_whoever_refuses_a_bundle_is_named() -> None:
    used = Bundle(version="v1", active=True)
    refused = Bundle(version="v1", refusal="its file is damaged")
    assert [bundle.refusal for bundle in merged([used], {"b": [refused]})] == ["controller b: its file is damaged"]
    assert [bundle.refusal for bundle in merged([refused], {"b": [used]})] == ["its file is damaged"]
