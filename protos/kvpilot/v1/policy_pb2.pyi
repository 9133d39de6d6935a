import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from kvpilot.v1 import common_pb2 as _common_pb2
from kvpilot.v1 import generation_pb2 as _generation_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetLoadRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetLoadResponse(_message.Message):
    __slots__ = ("controller", "workers")
    CONTROLLER_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    controller: str
    workers: int
    def __init__(self, controller: _Optional[str] = ..., workers: _Optional[int] = ...) -> None: ...

class SteerRequest(_message.Message):
    __slots__ = ("hello", "report", "ack", "nack")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    NACK_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    report: Report
    ack: Ack
    nack: Nack
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., report: _Optional[_Union[Report, _Mapping]] = ..., ack: _Optional[_Union[Ack, _Mapping]] = ..., nack: _Optional[_Union[Nack, _Mapping]] = ...) -> None: ...

class SteerResponse(_message.Message):
    __slots__ = ("welcome", "directive")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    DIRECTIVE_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    directive: Directive
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., directive: _Optional[_Union[Directive, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("worker", "version", "model", "layers", "kv_heads", "query_heads", "head_dim", "raw_dtype", "formats", "tiers", "feature_schema_hash", "far_horizons_tokens", "epochs", "protocol_version")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    QUERY_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    RAW_DTYPE_FIELD_NUMBER: _ClassVar[int]
    FORMATS_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    FEATURE_SCHEMA_HASH_FIELD_NUMBER: _ClassVar[int]
    FAR_HORIZONS_TOKENS_FIELD_NUMBER: _ClassVar[int]
    EPOCHS_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    worker: str
    version: str
    model: _generation_pb2.Model
    layers: int
    kv_heads: int
    query_heads: int
    head_dim: int
    raw_dtype: str
    formats: _containers.RepeatedScalarFieldContainer[str]
    tiers: _containers.RepeatedCompositeFieldContainer[Tier]
    feature_schema_hash: str
    far_horizons_tokens: _containers.RepeatedScalarFieldContainer[int]
    epochs: _containers.RepeatedCompositeFieldContainer[RequestEpoch]
    protocol_version: int
    def __init__(self, worker: _Optional[str] = ..., version: _Optional[str] = ..., model: _Optional[_Union[_generation_pb2.Model, _Mapping]] = ..., layers: _Optional[int] = ..., kv_heads: _Optional[int] = ..., query_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., raw_dtype: _Optional[str] = ..., formats: _Optional[_Iterable[str]] = ..., tiers: _Optional[_Iterable[_Union[Tier, _Mapping]]] = ..., feature_schema_hash: _Optional[str] = ..., far_horizons_tokens: _Optional[_Iterable[int]] = ..., epochs: _Optional[_Iterable[_Union[RequestEpoch, _Mapping]]] = ..., protocol_version: _Optional[int] = ...) -> None: ...

class Tier(_message.Message):
    __slots__ = ("name", "budget_bytes", "bandwidth_bytes_per_s")
    NAME_FIELD_NUMBER: _ClassVar[int]
    BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    BANDWIDTH_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    name: str
    budget_bytes: int
    bandwidth_bytes_per_s: float
    def __init__(self, name: _Optional[str] = ..., budget_bytes: _Optional[int] = ..., bandwidth_bytes_per_s: _Optional[float] = ...) -> None: ...

class RequestEpoch(_message.Message):
    __slots__ = ("request_id", "epoch")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    epoch: int
    def __init__(self, request_id: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class Report(_message.Message):
    __slots__ = ("sequence_number", "time", "worker", "requests", "ended_request_ids", "preempted_request_ids")
    SEQUENCE_NUMBER_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    ENDED_REQUEST_IDS_FIELD_NUMBER: _ClassVar[int]
    PREEMPTED_REQUEST_IDS_FIELD_NUMBER: _ClassVar[int]
    sequence_number: int
    time: _timestamp_pb2.Timestamp
    worker: WorkerState
    requests: _containers.RepeatedCompositeFieldContainer[RequestState]
    ended_request_ids: _containers.RepeatedScalarFieldContainer[str]
    preempted_request_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, sequence_number: _Optional[int] = ..., time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., worker: _Optional[_Union[WorkerState, _Mapping]] = ..., requests: _Optional[_Iterable[_Union[RequestState, _Mapping]]] = ..., ended_request_ids: _Optional[_Iterable[str]] = ..., preempted_request_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class WorkerState(_message.Message):
    __slots__ = ("running", "waiting", "tiers", "step_ms", "tokens_per_s", "preemptions", "audits", "audits_skipped", "audit_ms", "signal_ms", "decode_ms", "sessions", "recalls", "decode_steps", "evacuations", "lent_layers", "disk", "formats")
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    STEP_MS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    AUDITS_FIELD_NUMBER: _ClassVar[int]
    AUDITS_SKIPPED_FIELD_NUMBER: _ClassVar[int]
    AUDIT_MS_FIELD_NUMBER: _ClassVar[int]
    SIGNAL_MS_FIELD_NUMBER: _ClassVar[int]
    DECODE_MS_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    RECALLS_FIELD_NUMBER: _ClassVar[int]
    DECODE_STEPS_FIELD_NUMBER: _ClassVar[int]
    EVACUATIONS_FIELD_NUMBER: _ClassVar[int]
    LENT_LAYERS_FIELD_NUMBER: _ClassVar[int]
    DISK_FIELD_NUMBER: _ClassVar[int]
    FORMATS_FIELD_NUMBER: _ClassVar[int]
    running: int
    waiting: int
    tiers: _containers.RepeatedCompositeFieldContainer[TierUse]
    step_ms: float
    tokens_per_s: float
    preemptions: int
    audits: int
    audits_skipped: int
    audit_ms: float
    signal_ms: float
    decode_ms: float
    sessions: ParkedSessions
    recalls: Recalls
    decode_steps: int
    evacuations: int
    lent_layers: int
    disk: DiskUse
    formats: _containers.RepeatedCompositeFieldContainer[FormatUse]
    def __init__(self, running: _Optional[int] = ..., waiting: _Optional[int] = ..., tiers: _Optional[_Iterable[_Union[TierUse, _Mapping]]] = ..., step_ms: _Optional[float] = ..., tokens_per_s: _Optional[float] = ..., preemptions: _Optional[int] = ..., audits: _Optional[int] = ..., audits_skipped: _Optional[int] = ..., audit_ms: _Optional[float] = ..., signal_ms: _Optional[float] = ..., decode_ms: _Optional[float] = ..., sessions: _Optional[_Union[ParkedSessions, _Mapping]] = ..., recalls: _Optional[_Union[Recalls, _Mapping]] = ..., decode_steps: _Optional[int] = ..., evacuations: _Optional[int] = ..., lent_layers: _Optional[int] = ..., disk: _Optional[_Union[DiskUse, _Mapping]] = ..., formats: _Optional[_Iterable[_Union[FormatUse, _Mapping]]] = ...) -> None: ...

class DiskUse(_message.Message):
    __slots__ = ("written_bytes", "read_bytes", "write_ms", "read_ms", "damaged_blocks")
    WRITTEN_BYTES_FIELD_NUMBER: _ClassVar[int]
    READ_BYTES_FIELD_NUMBER: _ClassVar[int]
    WRITE_MS_FIELD_NUMBER: _ClassVar[int]
    READ_MS_FIELD_NUMBER: _ClassVar[int]
    DAMAGED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    written_bytes: int
    read_bytes: int
    write_ms: float
    read_ms: float
    damaged_blocks: int
    def __init__(self, written_bytes: _Optional[int] = ..., read_bytes: _Optional[int] = ..., write_ms: _Optional[float] = ..., read_ms: _Optional[float] = ..., damaged_blocks: _Optional[int] = ...) -> None: ...

class FormatUse(_message.Message):
    __slots__ = ("tier", "format", "bytes")
    TIER_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    tier: str
    format: str
    bytes: int
    def __init__(self, tier: _Optional[str] = ..., format: _Optional[str] = ..., bytes: _Optional[int] = ...) -> None: ...

class Recalls(_message.Message):
    __slots__ = ("tiers", "moved", "read_blocks", "skipped_blocks")
    TIERS_FIELD_NUMBER: _ClassVar[int]
    MOVED_FIELD_NUMBER: _ClassVar[int]
    READ_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    tiers: _containers.RepeatedCompositeFieldContainer[TierRecalls]
    moved: _containers.RepeatedCompositeFieldContainer[MovedBytes]
    read_blocks: int
    skipped_blocks: int
    def __init__(self, tiers: _Optional[_Iterable[_Union[TierRecalls, _Mapping]]] = ..., moved: _Optional[_Iterable[_Union[MovedBytes, _Mapping]]] = ..., read_blocks: _Optional[int] = ..., skipped_blocks: _Optional[int] = ...) -> None: ...

class TierRecalls(_message.Message):
    __slots__ = ("name", "there_blocks", "ahead_blocks", "waited_blocks", "in_place_blocks")
    NAME_FIELD_NUMBER: _ClassVar[int]
    THERE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    AHEAD_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    WAITED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    IN_PLACE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    name: str
    there_blocks: int
    ahead_blocks: int
    waited_blocks: int
    in_place_blocks: int
    def __init__(self, name: _Optional[str] = ..., there_blocks: _Optional[int] = ..., ahead_blocks: _Optional[int] = ..., waited_blocks: _Optional[int] = ..., in_place_blocks: _Optional[int] = ...) -> None: ...

class MovedBytes(_message.Message):
    __slots__ = ("from_tier", "to_tier", "bytes")
    FROM_TIER_FIELD_NUMBER: _ClassVar[int]
    TO_TIER_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    from_tier: str
    to_tier: str
    bytes: int
    def __init__(self, from_tier: _Optional[str] = ..., to_tier: _Optional[str] = ..., bytes: _Optional[int] = ...) -> None: ...

class ParkedSessions(_message.Message):
    __slots__ = ("parked", "host_bytes", "disk_bytes", "restored_turns", "restored_tokens", "dropped_pieces", "expired", "corrupt_pieces")
    PARKED_FIELD_NUMBER: _ClassVar[int]
    HOST_BYTES_FIELD_NUMBER: _ClassVar[int]
    DISK_BYTES_FIELD_NUMBER: _ClassVar[int]
    RESTORED_TURNS_FIELD_NUMBER: _ClassVar[int]
    RESTORED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DROPPED_PIECES_FIELD_NUMBER: _ClassVar[int]
    EXPIRED_FIELD_NUMBER: _ClassVar[int]
    CORRUPT_PIECES_FIELD_NUMBER: _ClassVar[int]
    parked: int
    host_bytes: int
    disk_bytes: int
    restored_turns: int
    restored_tokens: int
    dropped_pieces: int
    expired: int
    corrupt_pieces: int
    def __init__(self, parked: _Optional[int] = ..., host_bytes: _Optional[int] = ..., disk_bytes: _Optional[int] = ..., restored_turns: _Optional[int] = ..., restored_tokens: _Optional[int] = ..., dropped_pieces: _Optional[int] = ..., expired: _Optional[int] = ..., corrupt_pieces: _Optional[int] = ...) -> None: ...

class TierUse(_message.Message):
    __slots__ = ("name", "used_bytes", "budget_bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    used_bytes: int
    budget_bytes: int
    def __init__(self, name: _Optional[str] = ..., used_bytes: _Optional[int] = ..., budget_bytes: _Optional[int] = ...) -> None: ...

class RequestState(_message.Message):
    __slots__ = ("request_id", "epoch", "session_id", "scenario", "objective", "pinned", "pipeline", "prompt_tokens", "generated_tokens", "max_tokens", "kept_tokens", "cache", "signals", "loss_class", "last_switch", "prefilling", "prompt", "audits", "recalls", "trace_id")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    SCENARIO_FIELD_NUMBER: _ClassVar[int]
    OBJECTIVE_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    PIPELINE_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KEPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHE_FIELD_NUMBER: _ClassVar[int]
    SIGNALS_FIELD_NUMBER: _ClassVar[int]
    LOSS_CLASS_FIELD_NUMBER: _ClassVar[int]
    LAST_SWITCH_FIELD_NUMBER: _ClassVar[int]
    PREFILLING_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    AUDITS_FIELD_NUMBER: _ClassVar[int]
    RECALLS_FIELD_NUMBER: _ClassVar[int]
    TRACE_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    epoch: int
    session_id: str
    scenario: _common_pb2.Scenario
    objective: _common_pb2.Objective
    pinned: bool
    pipeline: str
    prompt_tokens: int
    generated_tokens: int
    max_tokens: int
    kept_tokens: float
    cache: _common_pb2.CacheBytes
    signals: Signals
    loss_class: _common_pb2.LossClass
    last_switch: _common_pb2.Switch
    prefilling: bool
    prompt: PromptStatistics
    audits: _containers.RepeatedCompositeFieldContainer[Audit]
    recalls: Recalls
    trace_id: str
    def __init__(self, request_id: _Optional[str] = ..., epoch: _Optional[int] = ..., session_id: _Optional[str] = ..., scenario: _Optional[_Union[_common_pb2.Scenario, str]] = ..., objective: _Optional[_Union[_common_pb2.Objective, _Mapping]] = ..., pinned: _Optional[bool] = ..., pipeline: _Optional[str] = ..., prompt_tokens: _Optional[int] = ..., generated_tokens: _Optional[int] = ..., max_tokens: _Optional[int] = ..., kept_tokens: _Optional[float] = ..., cache: _Optional[_Union[_common_pb2.CacheBytes, _Mapping]] = ..., signals: _Optional[_Union[Signals, _Mapping]] = ..., loss_class: _Optional[_Union[_common_pb2.LossClass, str]] = ..., last_switch: _Optional[_Union[_common_pb2.Switch, _Mapping]] = ..., prefilling: _Optional[bool] = ..., prompt: _Optional[_Union[PromptStatistics, _Mapping]] = ..., audits: _Optional[_Iterable[_Union[Audit, _Mapping]]] = ..., recalls: _Optional[_Union[Recalls, _Mapping]] = ..., trace_id: _Optional[str] = ...) -> None: ...

class PromptStatistics(_message.Message):
    __slots__ = ("distinct_share", "repeated_share", "unigram_entropy", "turns")
    DISTINCT_SHARE_FIELD_NUMBER: _ClassVar[int]
    REPEATED_SHARE_FIELD_NUMBER: _ClassVar[int]
    UNIGRAM_ENTROPY_FIELD_NUMBER: _ClassVar[int]
    TURNS_FIELD_NUMBER: _ClassVar[int]
    distinct_share: float
    repeated_share: float
    unigram_entropy: float
    turns: int
    def __init__(self, distinct_share: _Optional[float] = ..., repeated_share: _Optional[float] = ..., unigram_entropy: _Optional[float] = ..., turns: _Optional[int] = ...) -> None: ...

class Audit(_message.Message):
    __slots__ = ("at_token", "pipeline", "divergence", "divergence_max", "top1_agreement", "tokens", "cost_ms")
    AT_TOKEN_FIELD_NUMBER: _ClassVar[int]
    PIPELINE_FIELD_NUMBER: _ClassVar[int]
    DIVERGENCE_FIELD_NUMBER: _ClassVar[int]
    DIVERGENCE_MAX_FIELD_NUMBER: _ClassVar[int]
    TOP1_AGREEMENT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    COST_MS_FIELD_NUMBER: _ClassVar[int]
    at_token: int
    pipeline: str
    divergence: float
    divergence_max: float
    top1_agreement: float
    tokens: int
    cost_ms: float
    def __init__(self, at_token: _Optional[int] = ..., pipeline: _Optional[str] = ..., divergence: _Optional[float] = ..., divergence_max: _Optional[float] = ..., top1_agreement: _Optional[float] = ..., tokens: _Optional[int] = ..., cost_ms: _Optional[float] = ...) -> None: ...

class Signals(_message.Message):
    __slots__ = ("steps", "far_mass", "far_mass_max", "sink_mass", "attention_entropy", "next_token_entropy", "top1_probability", "repeat_rate", "far_mass_last", "far_mass_worst_layer", "dropped_votes", "dropped_votes_max", "surprise", "next_token_entropy_max", "far_votes", "far_votes_max", "far_votes_by_depth", "repeat_beyond", "copied_tokens", "copied_from_tokens", "far_mass_by_depth", "missed_votes", "missed_votes_max", "missed_votes_by_depth")
    STEPS_FIELD_NUMBER: _ClassVar[int]
    FAR_MASS_FIELD_NUMBER: _ClassVar[int]
    FAR_MASS_MAX_FIELD_NUMBER: _ClassVar[int]
    SINK_MASS_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_ENTROPY_FIELD_NUMBER: _ClassVar[int]
    NEXT_TOKEN_ENTROPY_FIELD_NUMBER: _ClassVar[int]
    TOP1_PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    REPEAT_RATE_FIELD_NUMBER: _ClassVar[int]
    FAR_MASS_LAST_FIELD_NUMBER: _ClassVar[int]
    FAR_MASS_WORST_LAYER_FIELD_NUMBER: _ClassVar[int]
    DROPPED_VOTES_FIELD_NUMBER: _ClassVar[int]
    DROPPED_VOTES_MAX_FIELD_NUMBER: _ClassVar[int]
    SURPRISE_FIELD_NUMBER: _ClassVar[int]
    NEXT_TOKEN_ENTROPY_MAX_FIELD_NUMBER: _ClassVar[int]
    FAR_VOTES_FIELD_NUMBER: _ClassVar[int]
    FAR_VOTES_MAX_FIELD_NUMBER: _ClassVar[int]
    FAR_VOTES_BY_DEPTH_FIELD_NUMBER: _ClassVar[int]
    REPEAT_BEYOND_FIELD_NUMBER: _ClassVar[int]
    COPIED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COPIED_FROM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FAR_MASS_BY_DEPTH_FIELD_NUMBER: _ClassVar[int]
    MISSED_VOTES_FIELD_NUMBER: _ClassVar[int]
    MISSED_VOTES_MAX_FIELD_NUMBER: _ClassVar[int]
    MISSED_VOTES_BY_DEPTH_FIELD_NUMBER: _ClassVar[int]
    steps: int
    far_mass: _containers.RepeatedScalarFieldContainer[float]
    far_mass_max: _containers.RepeatedScalarFieldContainer[float]
    sink_mass: float
    attention_entropy: float
    next_token_entropy: float
    top1_probability: float
    repeat_rate: float
    far_mass_last: _containers.RepeatedScalarFieldContainer[float]
    far_mass_worst_layer: _containers.RepeatedScalarFieldContainer[float]
    dropped_votes: _containers.RepeatedScalarFieldContainer[float]
    dropped_votes_max: _containers.RepeatedScalarFieldContainer[float]
    surprise: float
    next_token_entropy_max: float
    far_votes: _containers.RepeatedScalarFieldContainer[float]
    far_votes_max: _containers.RepeatedScalarFieldContainer[float]
    far_votes_by_depth: _containers.RepeatedScalarFieldContainer[float]
    repeat_beyond: _containers.RepeatedScalarFieldContainer[float]
    copied_tokens: int
    copied_from_tokens: int
    far_mass_by_depth: _containers.RepeatedScalarFieldContainer[float]
    missed_votes: _containers.RepeatedScalarFieldContainer[float]
    missed_votes_max: _containers.RepeatedScalarFieldContainer[float]
    missed_votes_by_depth: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, steps: _Optional[int] = ..., far_mass: _Optional[_Iterable[float]] = ..., far_mass_max: _Optional[_Iterable[float]] = ..., sink_mass: _Optional[float] = ..., attention_entropy: _Optional[float] = ..., next_token_entropy: _Optional[float] = ..., top1_probability: _Optional[float] = ..., repeat_rate: _Optional[float] = ..., far_mass_last: _Optional[_Iterable[float]] = ..., far_mass_worst_layer: _Optional[_Iterable[float]] = ..., dropped_votes: _Optional[_Iterable[float]] = ..., dropped_votes_max: _Optional[_Iterable[float]] = ..., surprise: _Optional[float] = ..., next_token_entropy_max: _Optional[float] = ..., far_votes: _Optional[_Iterable[float]] = ..., far_votes_max: _Optional[_Iterable[float]] = ..., far_votes_by_depth: _Optional[_Iterable[float]] = ..., repeat_beyond: _Optional[_Iterable[float]] = ..., copied_tokens: _Optional[int] = ..., copied_from_tokens: _Optional[int] = ..., far_mass_by_depth: _Optional[_Iterable[float]] = ..., missed_votes: _Optional[_Iterable[float]] = ..., missed_votes_max: _Optional[_Iterable[float]] = ..., missed_votes_by_depth: _Optional[_Iterable[float]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("controller", "report_interval_tokens", "default_pipeline", "version", "protocol_version", "workers")
    CONTROLLER_FIELD_NUMBER: _ClassVar[int]
    REPORT_INTERVAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_PIPELINE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    controller: str
    report_interval_tokens: int
    default_pipeline: str
    version: str
    protocol_version: int
    workers: int
    def __init__(self, controller: _Optional[str] = ..., report_interval_tokens: _Optional[int] = ..., default_pipeline: _Optional[str] = ..., version: _Optional[str] = ..., protocol_version: _Optional[int] = ..., workers: _Optional[int] = ...) -> None: ...

class Directive(_message.Message):
    __slots__ = ("nonce", "epoch", "request_id", "pipeline", "reason", "bundle", "deadline_token", "ordered_by", "cause")
    NONCE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PIPELINE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    ORDERED_BY_FIELD_NUMBER: _ClassVar[int]
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    nonce: str
    epoch: int
    request_id: str
    pipeline: str
    reason: str
    bundle: str
    deadline_token: int
    ordered_by: _common_pb2.Orderer
    cause: _common_pb2.Cause
    def __init__(self, nonce: _Optional[str] = ..., epoch: _Optional[int] = ..., request_id: _Optional[str] = ..., pipeline: _Optional[str] = ..., reason: _Optional[str] = ..., bundle: _Optional[str] = ..., deadline_token: _Optional[int] = ..., ordered_by: _Optional[_Union[_common_pb2.Orderer, str]] = ..., cause: _Optional[_Union[_common_pb2.Cause, str]] = ...) -> None: ...

class Ack(_message.Message):
    __slots__ = ("nonce", "request_id", "applied", "epoch")
    NONCE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    APPLIED_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    nonce: str
    request_id: str
    applied: _common_pb2.Switch
    epoch: int
    def __init__(self, nonce: _Optional[str] = ..., request_id: _Optional[str] = ..., applied: _Optional[_Union[_common_pb2.Switch, _Mapping]] = ..., epoch: _Optional[int] = ...) -> None: ...

class Nack(_message.Message):
    __slots__ = ("nonce", "request_id", "problem")
    NONCE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    nonce: str
    request_id: str
    problem: _common_pb2.Problem
    def __init__(self, nonce: _Optional[str] = ..., request_id: _Optional[str] = ..., problem: _Optional[_Union[_common_pb2.Problem, _Mapping]] = ...) -> None: ...
