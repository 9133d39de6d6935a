"""What both ends of the steering stream must agree on."""

from __future__ import annotations

STEERING_VERSION = 1
"""Newest version of the steering protocol that this release speaks; policy.proto says what each version has."""


def common_version(theirs: int) -> int:
    """The version in force with a peer that speaks up to ``theirs``; 0 for one that says nothing."""
    return max(0, min(theirs, STEERING_VERSION))
