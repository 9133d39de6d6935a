"""A result as the JSON document that ``kvpilot generate --json`` prints."""

from __future__ import annotations

from typing import Any

from google.protobuf import json_format  # type: ignore[import-untyped]
from google.protobuf.message import Message  # type: ignore[import-untyped]

from cli import text
from kvpilot.result import Result
from kvpilot.v1 import common_pb2, policy_pb2


def result_document(result: Result) -> dict[str, Any]:
    """Everything known about a job, numbers as numbers, enum values as words."""
    document: dict[str, Any] = {
        "job_id": result.job_id,
        "seed": result.seed,
        "worker": result.worker,
        "text": result.text,
        "token_ids": list(result.token_ids),
        "logprobs": [
            {
                "token_id": token.token_id,
                "logprob": token.logprob,
                "top": [{"token_id": token_id, "logprob": logprob} for token_id, logprob in token.top],
            }
            for token in result.logprobs
        ],
        "finish_reason": result.finish_reason.value if result.finish_reason else None,
        "pipeline": result.pipeline,
        "usage": fields(result.usage),
        "timings": fields(result.timings),
        "cache": fields(result.cache),
        "switches": [switch_document(switch) for switch in result.switches],
    }
    if result.finished is not None and result.finished.HasField("problem"):
        document["problem"] = fields(result.finished.problem)
    return document


def switch_document(switch: common_pb2.Switch) -> dict[str, Any]:
    """One change of pipeline."""
    return {
        "at_token": switch.at_token,
        "from": switch.from_pipeline,
        "to": switch.to_pipeline,
        "reason": switch.reason,
        "ordered_by": text.orderer(switch.ordered_by),
        "stall_ms": switch.stall_ms,
        "before": fields(switch.before),
        "after": fields(switch.after),
    }


def recalls_document(recalls: policy_pb2.Recalls) -> dict[str, Any]:
    """What was asked of lower tiers and moved between tiers."""
    return {
        "tiers": [fields(tier) for tier in recalls.tiers],
        "moved": [fields(pair) for pair in recalls.moved],
        "read_blocks": recalls.read_blocks,
        "skipped_blocks": recalls.skipped_blocks,
    }


def fields(message: Message) -> dict[str, Any]:
    """A flat message with its own field names; 64-bit integers stay numbers, unset scalars are their zero."""
    document: dict[str, Any] = json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    for field in message.DESCRIPTOR.fields:
        if field.cpp_type in (field.CPPTYPE_INT64, field.CPPTYPE_UINT64) and field.name in document:
            document[field.name] = int(document[field.name])
    return document
