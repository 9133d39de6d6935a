import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from kvpilot.v1 import common_pb2 as _common_pb2
from kvpilot.v1 import generation_pb2 as _generation_pb2
from kvpilot.v1 import operator_pb2 as _operator_pb2
from kvpilot.v1 import policy_pb2 as _policy_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Job(_message.Message):
    __slots__ = ("job_id", "request", "create_time", "traceparent")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    request: _generation_pb2.GenerateRequest
    create_time: _timestamp_pb2.Timestamp
    traceparent: str
    def __init__(self, job_id: _Optional[str] = ..., request: _Optional[_Union[_generation_pb2.GenerateRequest, _Mapping]] = ..., create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., traceparent: _Optional[str] = ...) -> None: ...

class WorkerCard(_message.Message):
    __slots__ = ("hello", "start_time")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    START_TIME_FIELD_NUMBER: _ClassVar[int]
    hello: _policy_pb2.Hello
    start_time: _timestamp_pb2.Timestamp
    def __init__(self, hello: _Optional[_Union[_policy_pb2.Hello, _Mapping]] = ..., start_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class ControllerCard(_message.Message):
    __slots__ = ("name", "address")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    name: str
    address: str
    def __init__(self, name: _Optional[str] = ..., address: _Optional[str] = ...) -> None: ...

class Outcome(_message.Message):
    __slots__ = ("job_id", "worker", "last_state", "finished", "audits")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    LAST_STATE_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    AUDITS_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    worker: str
    last_state: _policy_pb2.RequestState
    finished: _generation_pb2.Finished
    audits: _containers.RepeatedCompositeFieldContainer[_policy_pb2.Audit]
    def __init__(self, job_id: _Optional[str] = ..., worker: _Optional[str] = ..., last_state: _Optional[_Union[_policy_pb2.RequestState, _Mapping]] = ..., finished: _Optional[_Union[_generation_pb2.Finished, _Mapping]] = ..., audits: _Optional[_Iterable[_Union[_policy_pb2.Audit, _Mapping]]] = ...) -> None: ...

class Override(_message.Message):
    __slots__ = ("pipeline", "reason")
    PIPELINE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    pipeline: str
    reason: str
    def __init__(self, pipeline: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class DecisionEvent(_message.Message):
    __slots__ = ("decision_id", "request_id", "worker", "time", "decided", "answered", "measured")
    DECISION_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    DECIDED_FIELD_NUMBER: _ClassVar[int]
    ANSWERED_FIELD_NUMBER: _ClassVar[int]
    MEASURED_FIELD_NUMBER: _ClassVar[int]
    decision_id: str
    request_id: str
    worker: str
    time: _timestamp_pb2.Timestamp
    decided: Decided
    answered: Answered
    measured: Measured
    def __init__(self, decision_id: _Optional[str] = ..., request_id: _Optional[str] = ..., worker: _Optional[str] = ..., time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., decided: _Optional[_Union[Decided, _Mapping]] = ..., answered: _Optional[_Union[Answered, _Mapping]] = ..., measured: _Optional[_Union[Measured, _Mapping]] = ...) -> None: ...

class Decided(_message.Message):
    __slots__ = ("at_token", "from_pipeline", "pipeline", "reason", "outcome", "bundle", "feature_schema_hash", "features", "family", "predicted_divergence", "bound", "runner_up", "shadow_bundle", "shadow_divergence", "shadow_bound")
    AT_TOKEN_FIELD_NUMBER: _ClassVar[int]
    FROM_PIPELINE_FIELD_NUMBER: _ClassVar[int]
    PIPELINE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    FEATURE_SCHEMA_HASH_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_DIVERGENCE_FIELD_NUMBER: _ClassVar[int]
    BOUND_FIELD_NUMBER: _ClassVar[int]
    RUNNER_UP_FIELD_NUMBER: _ClassVar[int]
    SHADOW_BUNDLE_FIELD_NUMBER: _ClassVar[int]
    SHADOW_DIVERGENCE_FIELD_NUMBER: _ClassVar[int]
    SHADOW_BOUND_FIELD_NUMBER: _ClassVar[int]
    at_token: int
    from_pipeline: str
    pipeline: str
    reason: str
    outcome: _operator_pb2.DecisionOutcome
    bundle: str
    feature_schema_hash: str
    features: _containers.RepeatedScalarFieldContainer[float]
    family: str
    predicted_divergence: float
    bound: float
    runner_up: str
    shadow_bundle: str
    shadow_divergence: float
    shadow_bound: float
    def __init__(self, at_token: _Optional[int] = ..., from_pipeline: _Optional[str] = ..., pipeline: _Optional[str] = ..., reason: _Optional[str] = ..., outcome: _Optional[_Union[_operator_pb2.DecisionOutcome, str]] = ..., bundle: _Optional[str] = ..., feature_schema_hash: _Optional[str] = ..., features: _Optional[_Iterable[float]] = ..., family: _Optional[str] = ..., predicted_divergence: _Optional[float] = ..., bound: _Optional[float] = ..., runner_up: _Optional[str] = ..., shadow_bundle: _Optional[str] = ..., shadow_divergence: _Optional[float] = ..., shadow_bound: _Optional[float] = ...) -> None: ...

class Answered(_message.Message):
    __slots__ = ("outcome", "refusal", "applied")
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    APPLIED_FIELD_NUMBER: _ClassVar[int]
    outcome: _operator_pb2.DecisionOutcome
    refusal: str
    applied: _common_pb2.Switch
    def __init__(self, outcome: _Optional[_Union[_operator_pb2.DecisionOutcome, str]] = ..., refusal: _Optional[str] = ..., applied: _Optional[_Union[_common_pb2.Switch, _Mapping]] = ...) -> None: ...

class Measured(_message.Message):
    __slots__ = ("audit", "bound")
    AUDIT_FIELD_NUMBER: _ClassVar[int]
    BOUND_FIELD_NUMBER: _ClassVar[int]
    audit: _policy_pb2.Audit
    bound: float
    def __init__(self, audit: _Optional[_Union[_policy_pb2.Audit, _Mapping]] = ..., bound: _Optional[float] = ...) -> None: ...
