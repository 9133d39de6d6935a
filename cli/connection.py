"""Channels to a controller for the operator's commands."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from kvpilot.v1 import operator_pb2_grpc


@contextmanager
def operator_stub(endpoint: str) -> Iterator[operator_pb2_grpc.OperatorServiceStub]:
    """The operator's service at ``host:port``."""
    with grpc.insecure_channel(endpoint) as channel:
        yield operator_pb2_grpc.OperatorServiceStub(channel)  # type: ignore[no-untyped-call]
