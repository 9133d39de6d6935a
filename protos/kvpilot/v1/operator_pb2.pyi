import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from kvpilot.v1 import policy_pb2 as _policy_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class LogLevel(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LOG_LEVEL_UNSPECIFIED: _ClassVar[LogLevel]
    LOG_LEVEL_DEBUG: _ClassVar[LogLevel]
    LOG_LEVEL_INFO: _ClassVar[LogLevel]
    LOG_LEVEL_WARNING: _ClassVar[LogLevel]
    LOG_LEVEL_ERROR: _ClassVar[LogLevel]
    LOG_LEVEL_CONFIGURED: _ClassVar[LogLevel]

class Mode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MODE_UNSPECIFIED: _ClassVar[Mode]
    MODE_OFF: _ClassVar[Mode]
    MODE_ADVISORY: _ClassVar[Mode]
    MODE_ACTIVE: _ClassVar[Mode]

class DecisionOutcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DECISION_OUTCOME_UNSPECIFIED: _ClassVar[DecisionOutcome]
    DECISION_OUTCOME_KEEP: _ClassVar[DecisionOutcome]
    DECISION_OUTCOME_ADVISED: _ClassVar[DecisionOutcome]
    DECISION_OUTCOME_SENT: _ClassVar[DecisionOutcome]
    DECISION_OUTCOME_APPLIED: _ClassVar[DecisionOutcome]
    DECISION_OUTCOME_REFUSED: _ClassVar[DecisionOutcome]
LOG_LEVEL_UNSPECIFIED: LogLevel
LOG_LEVEL_DEBUG: LogLevel
LOG_LEVEL_INFO: LogLevel
LOG_LEVEL_WARNING: LogLevel
LOG_LEVEL_ERROR: LogLevel
LOG_LEVEL_CONFIGURED: LogLevel
MODE_UNSPECIFIED: Mode
MODE_OFF: Mode
MODE_ADVISORY: Mode
MODE_ACTIVE: Mode
DECISION_OUTCOME_UNSPECIFIED: DecisionOutcome
DECISION_OUTCOME_KEEP: DecisionOutcome
DECISION_OUTCOME_ADVISED: DecisionOutcome
DECISION_OUTCOME_SENT: DecisionOutcome
DECISION_OUTCOME_APPLIED: DecisionOutcome
DECISION_OUTCOME_REFUSED: DecisionOutcome

class SetLogLevelRequest(_message.Message):
    __slots__ = ("level", "process", "duration_ms")
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    PROCESS_FIELD_NUMBER: _ClassVar[int]
    DURATION_MS_FIELD_NUMBER: _ClassVar[int]
    level: LogLevel
    process: str
    duration_ms: int
    def __init__(self, level: _Optional[_Union[LogLevel, str]] = ..., process: _Optional[str] = ..., duration_ms: _Optional[int] = ...) -> None: ...

class SetLogLevelResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListLogLevelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListLogLevelsResponse(_message.Message):
    __slots__ = ("orders",)
    ORDERS_FIELD_NUMBER: _ClassVar[int]
    orders: _containers.RepeatedCompositeFieldContainer[LogLevelOrder]
    def __init__(self, orders: _Optional[_Iterable[_Union[LogLevelOrder, _Mapping]]] = ...) -> None: ...

class LogLevelOrder(_message.Message):
    __slots__ = ("process", "level", "until")
    PROCESS_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    UNTIL_FIELD_NUMBER: _ClassVar[int]
    process: str
    level: LogLevel
    until: _timestamp_pb2.Timestamp
    def __init__(self, process: _Optional[str] = ..., level: _Optional[_Union[LogLevel, str]] = ..., until: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class ListWorkersRequest(_message.Message):
    __slots__ = ("only_here",)
    ONLY_HERE_FIELD_NUMBER: _ClassVar[int]
    only_here: bool
    def __init__(self, only_here: _Optional[bool] = ...) -> None: ...

class ListWorkersResponse(_message.Message):
    __slots__ = ("workers", "silent_controllers")
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    SILENT_CONTROLLERS_FIELD_NUMBER: _ClassVar[int]
    workers: _containers.RepeatedCompositeFieldContainer[Worker]
    silent_controllers: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, workers: _Optional[_Iterable[_Union[Worker, _Mapping]]] = ..., silent_controllers: _Optional[_Iterable[str]] = ...) -> None: ...

class Worker(_message.Message):
    __slots__ = ("hello", "state", "attach_time", "report_time", "controller")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ATTACH_TIME_FIELD_NUMBER: _ClassVar[int]
    REPORT_TIME_FIELD_NUMBER: _ClassVar[int]
    CONTROLLER_FIELD_NUMBER: _ClassVar[int]
    hello: _policy_pb2.Hello
    state: _policy_pb2.WorkerState
    attach_time: _timestamp_pb2.Timestamp
    report_time: _timestamp_pb2.Timestamp
    controller: str
    def __init__(self, hello: _Optional[_Union[_policy_pb2.Hello, _Mapping]] = ..., state: _Optional[_Union[_policy_pb2.WorkerState, _Mapping]] = ..., attach_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., report_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., controller: _Optional[str] = ...) -> None: ...

class ListRequestsRequest(_message.Message):
    __slots__ = ("worker", "only_here")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    ONLY_HERE_FIELD_NUMBER: _ClassVar[int]
    worker: str
    only_here: bool
    def __init__(self, worker: _Optional[str] = ..., only_here: _Optional[bool] = ...) -> None: ...

class ListRequestsResponse(_message.Message):
    __slots__ = ("requests", "silent_controllers")
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    SILENT_CONTROLLERS_FIELD_NUMBER: _ClassVar[int]
    requests: _containers.RepeatedCompositeFieldContainer[LiveRequest]
    silent_controllers: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, requests: _Optional[_Iterable[_Union[LiveRequest, _Mapping]]] = ..., silent_controllers: _Optional[_Iterable[str]] = ...) -> None: ...

class LiveRequest(_message.Message):
    __slots__ = ("worker", "state", "decision", "overridden")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    DECISION_FIELD_NUMBER: _ClassVar[int]
    OVERRIDDEN_FIELD_NUMBER: _ClassVar[int]
    worker: str
    state: _policy_pb2.RequestState
    decision: Decision
    overridden: bool
    def __init__(self, worker: _Optional[str] = ..., state: _Optional[_Union[_policy_pb2.RequestState, _Mapping]] = ..., decision: _Optional[_Union[Decision, _Mapping]] = ..., overridden: _Optional[bool] = ...) -> None: ...

class Decision(_message.Message):
    __slots__ = ("pipeline", "reason", "time", "outcome", "refusal", "bundle", "predicted_divergence", "bound", "runner_up")
    PIPELINE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_DIVERGENCE_FIELD_NUMBER: _ClassVar[int]
    BOUND_FIELD_NUMBER: _ClassVar[int]
    RUNNER_UP_FIELD_NUMBER: _ClassVar[int]
    pipeline: str
    reason: str
    time: _timestamp_pb2.Timestamp
    outcome: DecisionOutcome
    refusal: str
    bundle: str
    predicted_divergence: float
    bound: float
    runner_up: str
    def __init__(self, pipeline: _Optional[str] = ..., reason: _Optional[str] = ..., time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., outcome: _Optional[_Union[DecisionOutcome, str]] = ..., refusal: _Optional[str] = ..., bundle: _Optional[str] = ..., predicted_divergence: _Optional[float] = ..., bound: _Optional[float] = ..., runner_up: _Optional[str] = ...) -> None: ...

class OverridePipelineRequest(_message.Message):
    __slots__ = ("request_id", "pipeline", "reason", "only_here")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PIPELINE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ONLY_HERE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    pipeline: str
    reason: str
    only_here: bool
    def __init__(self, request_id: _Optional[str] = ..., pipeline: _Optional[str] = ..., reason: _Optional[str] = ..., only_here: _Optional[bool] = ...) -> None: ...

class OverridePipelineResponse(_message.Message):
    __slots__ = ("ack",)
    ACK_FIELD_NUMBER: _ClassVar[int]
    ack: _policy_pb2.Ack
    def __init__(self, ack: _Optional[_Union[_policy_pb2.Ack, _Mapping]] = ...) -> None: ...

class ReleasePipelineRequest(_message.Message):
    __slots__ = ("request_id", "only_here")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ONLY_HERE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    only_here: bool
    def __init__(self, request_id: _Optional[str] = ..., only_here: _Optional[bool] = ...) -> None: ...

class ReleasePipelineResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListBundlesRequest(_message.Message):
    __slots__ = ("only_here",)
    ONLY_HERE_FIELD_NUMBER: _ClassVar[int]
    only_here: bool
    def __init__(self, only_here: _Optional[bool] = ...) -> None: ...

class ListBundlesResponse(_message.Message):
    __slots__ = ("bundles", "silent_controllers")
    BUNDLES_FIELD_NUMBER: _ClassVar[int]
    SILENT_CONTROLLERS_FIELD_NUMBER: _ClassVar[int]
    bundles: _containers.RepeatedCompositeFieldContainer[Bundle]
    silent_controllers: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, bundles: _Optional[_Iterable[_Union[Bundle, _Mapping]]] = ..., silent_controllers: _Optional[_Iterable[str]] = ...) -> None: ...

class Bundle(_message.Message):
    __slots__ = ("version", "active", "shadow", "refusal", "alpha", "audits", "exceeded", "alarms", "drifts", "mean_log_residual")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_FIELD_NUMBER: _ClassVar[int]
    SHADOW_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    AUDITS_FIELD_NUMBER: _ClassVar[int]
    EXCEEDED_FIELD_NUMBER: _ClassVar[int]
    ALARMS_FIELD_NUMBER: _ClassVar[int]
    DRIFTS_FIELD_NUMBER: _ClassVar[int]
    MEAN_LOG_RESIDUAL_FIELD_NUMBER: _ClassVar[int]
    version: str
    active: bool
    shadow: bool
    refusal: str
    alpha: float
    audits: int
    exceeded: int
    alarms: int
    drifts: int
    mean_log_residual: float
    def __init__(self, version: _Optional[str] = ..., active: _Optional[bool] = ..., shadow: _Optional[bool] = ..., refusal: _Optional[str] = ..., alpha: _Optional[float] = ..., audits: _Optional[int] = ..., exceeded: _Optional[int] = ..., alarms: _Optional[int] = ..., drifts: _Optional[int] = ..., mean_log_residual: _Optional[float] = ...) -> None: ...

class GetModeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetModeResponse(_message.Message):
    __slots__ = ("mode",)
    MODE_FIELD_NUMBER: _ClassVar[int]
    mode: Mode
    def __init__(self, mode: _Optional[_Union[Mode, str]] = ...) -> None: ...

class SetModeRequest(_message.Message):
    __slots__ = ("mode",)
    MODE_FIELD_NUMBER: _ClassVar[int]
    mode: Mode
    def __init__(self, mode: _Optional[_Union[Mode, str]] = ...) -> None: ...

class SetModeResponse(_message.Message):
    __slots__ = ("previous",)
    PREVIOUS_FIELD_NUMBER: _ClassVar[int]
    previous: Mode
    def __init__(self, previous: _Optional[_Union[Mode, str]] = ...) -> None: ...
