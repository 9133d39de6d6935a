from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Scenario(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SCENARIO_UNSPECIFIED: _ClassVar[Scenario]
    SCENARIO_LONG_CONTEXT: _ClassVar[Scenario]
    SCENARIO_HIGH_THROUGHPUT: _ClassVar[Scenario]
    SCENARIO_EDGE: _ClassVar[Scenario]
    SCENARIO_MULTI_TURN: _ClassVar[Scenario]
    SCENARIO_ACCURACY_CRITICAL: _ClassVar[Scenario]
    SCENARIO_STREAMING: _ClassVar[Scenario]
    SCENARIO_MIXED: _ClassVar[Scenario]
    SCENARIO_PREFILL_HEAVY: _ClassVar[Scenario]
    SCENARIO_MINIMAL_MODIFICATION: _ClassVar[Scenario]
    SCENARIO_HARDWARE_SPECIFIC: _ClassVar[Scenario]

class LossClass(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LOSS_CLASS_UNSPECIFIED: _ClassVar[LossClass]
    LOSS_CLASS_EXACT: _ClassVar[LossClass]
    LOSS_CLASS_RECOVERABLE: _ClassVar[LossClass]
    LOSS_CLASS_PERMANENT: _ClassVar[LossClass]

class Cause(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CAUSE_UNSPECIFIED: _ClassVar[Cause]
    CAUSE_PRESSURE: _ClassVar[Cause]
    CAUSE_ROOM: _ClassVar[Cause]
    CAUSE_QUALITY: _ClassVar[Cause]
    CAUSE_COST: _ClassVar[Cause]
    CAUSE_OPERATOR: _ClassVar[Cause]

class Orderer(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ORDERER_UNSPECIFIED: _ClassVar[Orderer]
    ORDERER_CLIENT: _ClassVar[Orderer]
    ORDERER_CONTROLLER: _ClassVar[Orderer]
    ORDERER_OPERATOR: _ClassVar[Orderer]
    ORDERER_WORKER: _ClassVar[Orderer]
SCENARIO_UNSPECIFIED: Scenario
SCENARIO_LONG_CONTEXT: Scenario
SCENARIO_HIGH_THROUGHPUT: Scenario
SCENARIO_EDGE: Scenario
SCENARIO_MULTI_TURN: Scenario
SCENARIO_ACCURACY_CRITICAL: Scenario
SCENARIO_STREAMING: Scenario
SCENARIO_MIXED: Scenario
SCENARIO_PREFILL_HEAVY: Scenario
SCENARIO_MINIMAL_MODIFICATION: Scenario
SCENARIO_HARDWARE_SPECIFIC: Scenario
LOSS_CLASS_UNSPECIFIED: LossClass
LOSS_CLASS_EXACT: LossClass
LOSS_CLASS_RECOVERABLE: LossClass
LOSS_CLASS_PERMANENT: LossClass
CAUSE_UNSPECIFIED: Cause
CAUSE_PRESSURE: Cause
CAUSE_ROOM: Cause
CAUSE_QUALITY: Cause
CAUSE_COST: Cause
CAUSE_OPERATOR: Cause
ORDERER_UNSPECIFIED: Orderer
ORDERER_CLIENT: Orderer
ORDERER_CONTROLLER: Orderer
ORDERER_OPERATOR: Orderer
ORDERER_WORKER: Orderer

class Objective(_message.Message):
    __slots__ = ("max_divergence", "latency_weight", "memory_weight")
    MAX_DIVERGENCE_FIELD_NUMBER: _ClassVar[int]
    LATENCY_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    MEMORY_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    max_divergence: float
    latency_weight: float
    memory_weight: float
    def __init__(self, max_divergence: _Optional[float] = ..., latency_weight: _Optional[float] = ..., memory_weight: _Optional[float] = ...) -> None: ...

class CacheBytes(_message.Message):
    __slots__ = ("device_bytes", "host_bytes", "shadow_bytes", "peak_device_bytes", "full_cache_bytes", "device_bytes_16bit", "peak_device_bytes_16bit", "full_cache_bytes_16bit", "disk_bytes")
    DEVICE_BYTES_FIELD_NUMBER: _ClassVar[int]
    HOST_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHADOW_BYTES_FIELD_NUMBER: _ClassVar[int]
    PEAK_DEVICE_BYTES_FIELD_NUMBER: _ClassVar[int]
    FULL_CACHE_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_BYTES_16BIT_FIELD_NUMBER: _ClassVar[int]
    PEAK_DEVICE_BYTES_16BIT_FIELD_NUMBER: _ClassVar[int]
    FULL_CACHE_BYTES_16BIT_FIELD_NUMBER: _ClassVar[int]
    DISK_BYTES_FIELD_NUMBER: _ClassVar[int]
    device_bytes: int
    host_bytes: int
    shadow_bytes: int
    peak_device_bytes: int
    full_cache_bytes: int
    device_bytes_16bit: int
    peak_device_bytes_16bit: int
    full_cache_bytes_16bit: int
    disk_bytes: int
    def __init__(self, device_bytes: _Optional[int] = ..., host_bytes: _Optional[int] = ..., shadow_bytes: _Optional[int] = ..., peak_device_bytes: _Optional[int] = ..., full_cache_bytes: _Optional[int] = ..., device_bytes_16bit: _Optional[int] = ..., peak_device_bytes_16bit: _Optional[int] = ..., full_cache_bytes_16bit: _Optional[int] = ..., disk_bytes: _Optional[int] = ...) -> None: ...

class Switch(_message.Message):
    __slots__ = ("at_token", "from_pipeline", "to_pipeline", "reason", "ordered_by", "before", "after", "stall_ms", "cause")
    AT_TOKEN_FIELD_NUMBER: _ClassVar[int]
    FROM_PIPELINE_FIELD_NUMBER: _ClassVar[int]
    TO_PIPELINE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ORDERED_BY_FIELD_NUMBER: _ClassVar[int]
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    STALL_MS_FIELD_NUMBER: _ClassVar[int]
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    at_token: int
    from_pipeline: str
    to_pipeline: str
    reason: str
    ordered_by: Orderer
    before: CacheBytes
    after: CacheBytes
    stall_ms: float
    cause: Cause
    def __init__(self, at_token: _Optional[int] = ..., from_pipeline: _Optional[str] = ..., to_pipeline: _Optional[str] = ..., reason: _Optional[str] = ..., ordered_by: _Optional[_Union[Orderer, str]] = ..., before: _Optional[_Union[CacheBytes, _Mapping]] = ..., after: _Optional[_Union[CacheBytes, _Mapping]] = ..., stall_ms: _Optional[float] = ..., cause: _Optional[_Union[Cause, str]] = ...) -> None: ...

class Problem(_message.Message):
    __slots__ = ("code", "message", "violations", "retry_after_ms")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    VIOLATIONS_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    code: int
    message: str
    violations: _containers.RepeatedCompositeFieldContainer[FieldViolation]
    retry_after_ms: int
    def __init__(self, code: _Optional[int] = ..., message: _Optional[str] = ..., violations: _Optional[_Iterable[_Union[FieldViolation, _Mapping]]] = ..., retry_after_ms: _Optional[int] = ...) -> None: ...

class FieldViolation(_message.Message):
    __slots__ = ("field", "description")
    FIELD_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    field: str
    description: str
    def __init__(self, field: _Optional[str] = ..., description: _Optional[str] = ...) -> None: ...
