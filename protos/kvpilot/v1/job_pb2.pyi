import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from kvpilot.v1 import generation_pb2 as _generation_pb2
from kvpilot.v1 import policy_pb2 as _policy_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Job(_message.Message):
    __slots__ = ("job_id", "request", "create_time")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    request: _generation_pb2.GenerateRequest
    create_time: _timestamp_pb2.Timestamp
    def __init__(self, job_id: _Optional[str] = ..., request: _Optional[_Union[_generation_pb2.GenerateRequest, _Mapping]] = ..., create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class WorkerCard(_message.Message):
    __slots__ = ("hello", "start_time")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    START_TIME_FIELD_NUMBER: _ClassVar[int]
    hello: _policy_pb2.Hello
    start_time: _timestamp_pb2.Timestamp
    def __init__(self, hello: _Optional[_Union[_policy_pb2.Hello, _Mapping]] = ..., start_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

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
