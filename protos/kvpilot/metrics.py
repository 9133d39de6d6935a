"""Every metric that kvpilot's processes expose: names, labels, units and buckets, in one place.

``docs/metrics.md`` is made of this module (``python docs/generate_metrics.py``); ``kvpilot.exposition`` makes them
instruments and serves them.

Names say unit and kind as Prometheus has it: base units, ``_total`` for counts that only rise. Labels take few values:
models, tiers, formats, families of pipelines, enumerations of the API. Requests, sessions and pipeline texts are never
labels; logs and traces have those. A worker serves one model, which is a label of all its metrics, so that panels sum
by model without a join; which process it was, Prometheus adds (``instance``, ``pod``).

Where a dashboard made elsewhere expects a figure of the same meaning, :attr:`Metric.elsewhere` has its name there: of
OpenTelemetry's semantic conventions for generative AI, as an exporter spells it for Prometheus, and of vLLM. Such
series are not exposed a second time: whoever sums over both would count each request twice, and ``vllm:`` is a promise
that another program keeps. A recording rule or a relabelling gives them the other name where one is wanted; buckets are
the conventions' own, with longer ones added, so that quantiles compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """What Prometheus calls a metric's type."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Part(StrEnum):
    """Which part of kvpilot exposes a metric; a controller process has the parts that are its roles."""

    PROCESS = "every process"
    SERVER = "controller"
    GENERATION = "controller, role generation"
    STEERING = "controller, role steering"
    WORKER = "worker"


@dataclass(frozen=True)
class Metric:
    """A metric.

    Attributes:
        name: as Prometheus shows it, ``_total`` of counters included.
        kind: its type.
        help: what it says, one sentence or two.
        labels: names of its labels, always given in this order.
        buckets: upper ends, of histograms alone; +Inf is added.
        elsewhere: names of the same figure in other vocabularies.
        part: who exposes it.
    """

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    elsewhere: tuple[str, ...] = ()
    part: Part = Part.WORKER

    @property
    def unit(self) -> str:
        """Unit of its values; empty for counts."""
        words = self.name.removesuffix("_total").split("_")
        return words[-1] if words[-1] in ("seconds", "bytes", "nats", "tokens", "blocks") else ""


FIRST_TOKEN_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
PER_TOKEN_S = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5)
REQUEST_S = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92, 163.84, 327.68)
STALL_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
PLAN_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25)
CALL_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
NATS = (1e-6, 1e-5, 1e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)

_C, _G, _H = Kind.COUNTER, Kind.GAUGE, Kind.HISTOGRAM
_MODEL = ("model",)

# -- requests, as the worker that computes them sees them --------------------------------------------------------------

REQUESTS = Metric(
    "kvpilot_requests_total",
    _C,
    "Requests that ended, by outcome: stop_token, stop_string, length, cancelled, failed, and measured, of replays."
    " One that was handed over counts where it ended.",
    ("model", "outcome"),
    elsewhere=("vllm:request_success_total",),
)
PROMPT_TOKENS = Metric(
    "kvpilot_prompt_tokens_total",
    _C,
    "Prompt tokens of requests that a worker began, reused ones included.",
    _MODEL,
    elsewhere=("vllm:prompt_tokens_total",),
)
REUSED_PROMPT_TOKENS = Metric(
    "kvpilot_reused_prompt_tokens_total",
    _C,
    "Prompt tokens that were not computed, since a prefix or a session had them; counted when the request ends.",
    _MODEL,
    elsewhere=("vllm:prefix_cache_hits_total",),
)
GENERATED_TOKENS = Metric(
    "kvpilot_generated_tokens_total",
    _C,
    "Tokens generated and handed to the job store.",
    _MODEL,
    elsewhere=("vllm:generation_tokens_total",),
)
TIME_TO_FIRST_TOKEN = Metric(
    "kvpilot_time_to_first_token_seconds",
    _H,
    "From a front door's taking a request to its first token. By two machines' clocks where these are two; a request"
    " that another worker began is left out.",
    _MODEL,
    FIRST_TOKEN_S,
    ("gen_ai_server_time_to_first_token_seconds", "vllm:time_to_first_token_seconds"),
)
INTER_TOKEN = Metric(
    "kvpilot_inter_token_seconds",
    _H,
    "From one token of a request to its next, an observation per token: switches, preemptions and other requests'"
    " prompts included.",
    _MODEL,
    PER_TOKEN_S,
    ("gen_ai_server_time_per_output_token_seconds", "vllm:inter_token_latency_seconds"),
)
REQUEST_QUEUE = Metric(
    "kvpilot_request_queue_seconds",
    _H,
    "From a front door's taking a request to a worker's beginning with it; a request that another worker began is left"
    " out.",
    _MODEL,
    FIRST_TOKEN_S,
    ("vllm:request_queue_time_seconds",),
)
REQUEST_PREFILL = Metric(
    "kvpilot_request_prefill_seconds",
    _H,
    "From a worker's beginning with a request to the first token it generated for it, waiting for memory included.",
    _MODEL,
    FIRST_TOKEN_S,
    ("vllm:request_prefill_time_seconds",),
)
REQUEST_DECODE = Metric(
    "kvpilot_request_decode_seconds",
    _H,
    "From the first to the last token that a worker generated for a request.",
    _MODEL,
    REQUEST_S,
    ("vllm:request_decode_time_seconds",),
)
REQUEST_DURATION = Metric(
    "kvpilot_request_duration_seconds",
    _H,
    "From a front door's taking a request to its end, whatever the outcome.",
    _MODEL,
    REQUEST_S,
    ("gen_ai_server_request_duration_seconds", "vllm:e2e_request_latency_seconds"),
)
REQUESTS_RUNNING = Metric(
    "kvpilot_requests_running",
    _G,
    "Requests being prefilled or decoded.",
    _MODEL,
    elsewhere=("vllm:num_requests_running",),
)
REQUESTS_WAITING = Metric(
    "kvpilot_requests_waiting",
    _G,
    "Requests that a worker took and that wait for its memory; those that no worker took yet: kvpilot_queue_jobs.",
    _MODEL,
    elsewhere=("vllm:num_requests_waiting",),
)
REQUESTS_BY_FAMILY = Metric(
    "kvpilot_requests_by_pipeline",
    _G,
    "Live requests by family of the pipeline in force (exact, quantise, window, scored, window+quantise,"
    " scored+quantise, other) and loss class (exact, recoverable, permanent), as last reported.",
    ("model", "family", "loss_class"),
)
JOBS_HELD = Metric("kvpilot_jobs_held", _G, "Jobs under this worker's lease.", _MODEL)
JOBS_CLAIMED = Metric(
    "kvpilot_jobs_claimed_total",
    _C,
    "Jobs taken: `fresh`, or `again` where a worker had begun before and was lost or handed them back.",
    ("model", "kind"),
)
UNDELIVERED_EVENTS = Metric(
    "kvpilot_undelivered_events", _G, "Events that the job store does not have yet; they wait in the worker.", _MODEL
)

# -- the step loop -----------------------------------------------------------------------------------------------------

DECODE_STEPS = Metric("kvpilot_decode_steps_total", _C, "Decode steps, each of all decoding requests.", _MODEL)
DECODE_TIME = Metric(
    "kvpilot_decode_seconds_total", _C, "Time that decode steps took, without signals and audits.", _MODEL
)
SIGNAL_TIME = Metric("kvpilot_signal_seconds_total", _C, "Time spent on signals of the requests.", _MODEL)
PREEMPTIONS = Metric(
    "kvpilot_preemptions_total",
    _C,
    "Requests that lost their memory to others, or to damage on disk, and were computed again.",
    _MODEL,
    elsewhere=("vllm:num_preemptions_total",),
)
EVACUATIONS = Metric(
    "kvpilot_evacuations_total", _C, "Times that computed rows of a prompt left the device to make room.", _MODEL
)
LENT_LAYERS = Metric("kvpilot_lent_layers", _G, "Layers of the model that lend their memory to the cache now.", _MODEL)

# -- the cache ---------------------------------------------------------------------------------------------------------

CACHE_BYTES = Metric(
    "kvpilot_cache_bytes",
    _G,
    "Bytes of pages and files that hold blocks, by tier (device, host, disk) and format (raw, fp8, int8, int4, int2"
    " and others): blocks of requests, shadows, prefixes and sessions.",
    ("model", "tier", "format"),
)
TIER_USED = Metric(
    "kvpilot_tier_used_bytes",
    _G,
    "Bytes in use of a tier; unused prefixes and parked sessions are left out, since they give way at once.",
    ("model", "tier"),
    elsewhere=("vllm:kv_cache_usage_perc (of tier device, divided by kvpilot_tier_budget_bytes)",),
)
TIER_BUDGET = Metric(
    "kvpilot_tier_budget_bytes", _G, "Bytes that a tier may take, lent memory included.", ("model", "tier")
)
REQUEST_BYTES = Metric(
    "kvpilot_request_bytes", _G, "Bytes of live requests' caches by tier, without shadows.", ("model", "tier")
)
SHADOW_BYTES = Metric(
    "kvpilot_shadow_bytes", _G, "Bytes of exact copies that live requests keep on lower tiers.", _MODEL
)
FULL_BYTES = Metric(
    "kvpilot_full_cache_bytes",
    _G,
    "Bytes that the same tokens would take with pipeline `full`, all on the device.",
    _MODEL,
)
RECALL_BLOCKS = Metric(
    "kvpilot_recall_blocks_total",
    _C,
    "Blocks that decode steps asked a tier for: `there` already, brought `ahead`, `waited` for, or read `in_place`.",
    ("model", "tier", "found"),
)
SELECTED_BLOCKS = Metric(
    "kvpilot_selected_blocks_total",
    _C,
    "Blocks that queries were free to skip: `read` or `skipped`.",
    ("model", "choice"),
)
MOVED_BYTES = Metric(
    "kvpilot_moved_bytes_total",
    _C,
    "Bytes of blocks copied or built, as stored where they went.",
    ("model", "from_tier", "to_tier"),
)
DISK_WRITTEN = Metric("kvpilot_disk_written_bytes_total", _C, "Bytes written to the disk tier's files.", _MODEL)
DISK_READ = Metric("kvpilot_disk_read_bytes_total", _C, "Bytes read from the disk tier's files.", _MODEL)
DISK_WRITE_TIME = Metric("kvpilot_disk_write_seconds_total", _C, "Time that the store's threads spent writing.", _MODEL)
DISK_READ_TIME = Metric("kvpilot_disk_read_seconds_total", _C, "Time that the store's threads spent reading.", _MODEL)
DISK_DAMAGED = Metric(
    "kvpilot_disk_damaged_blocks_total", _C, "Blocks that disk did not give back as they were written.", _MODEL
)
SESSIONS_PARKED = Metric("kvpilot_sessions_parked", _G, "Sessions kept between two turns.", _MODEL)
SESSION_BYTES = Metric("kvpilot_session_bytes", _G, "Bytes kept of parked sessions, by tier.", ("model", "tier"))
SESSION_TURNS = Metric(
    "kvpilot_session_restored_turns_total", _C, "Turns that began with what the one before had left.", _MODEL
)
SESSION_TOKENS = Metric("kvpilot_session_restored_tokens_total", _C, "Tokens that those turns did not compute.", _MODEL)
SESSION_DROPPED = Metric(
    "kvpilot_session_dropped_pieces_total", _C, "Pieces of parked sessions given up for want of room.", _MODEL
)
SESSIONS_EXPIRED = Metric("kvpilot_sessions_expired_total", _C, "Sessions whose time was over.", _MODEL)

# -- switches and audits, in the worker --------------------------------------------------------------------------------

SWITCHES = Metric(
    "kvpilot_switches_total",
    _C,
    "Changes of a request's pipeline, by who ordered them (client, controller, operator, worker), why (pressure, room,"
    " quality, cost, operator, other) and outcome (applied, refused). Of controller and operator: Acks and Nacks.",
    ("model", "ordered_by", "reason", "outcome"),
)
SWITCH_STALL = Metric(
    "kvpilot_switch_stall_seconds",
    _H,
    "How long a switch kept its request's decoding waiting: the conversion, or where it was spread over steps, the"
    " longest pause that one of them had.",
    _MODEL,
    STALL_S,
)
SWITCH_BYTES = Metric(
    "kvpilot_switch_device_bytes_total",
    _C,
    "Device bytes that switches `freed` or `took`, each by its request's figures before and after.",
    ("model", "direction"),
)
AUDITS = Metric("kvpilot_audits_total", _C, "Audits made: runs of decode steps computed again exactly.", _MODEL)
AUDITS_SKIPPED = Metric(
    "kvpilot_audits_skipped_total",
    _C,
    "Audits that were due and not made, for want of budget or of an exact copy.",
    _MODEL,
)
AUDIT_TIME = Metric("kvpilot_audit_seconds_total", _C, "Time that audits took: their cost.", _MODEL)
AUDIT_BUDGET = Metric(
    "kvpilot_audit_budget_ratio", _G, "Most of it that the worker's settings admit, as a share of decoding.", _MODEL
)
MEASURED_DIVERGENCE = Metric(
    "kvpilot_measured_divergence_nats",
    _H,
    "Mean KL divergence from the full cache that an audit measured, nats per token, by family of the pipeline.",
    ("model", "family"),
    NATS,
)
STEERED = Metric("kvpilot_worker_steered", _G, "1 while a controller is attached, else 0.", _MODEL)
WORKER_INFO = Metric("kvpilot_worker_info", _G, "1; names the worker.", ("model", "worker"))

# -- front doors -------------------------------------------------------------------------------------------------------

_DOOR = Part.GENERATION
JOBS_ACCEPTED = Metric(
    "kvpilot_jobs_accepted_total",
    _C,
    "Requests that became jobs; `attached`: to one that was there.",
    ("model", "kind"),
    part=_DOOR,
)
DELIVERED_TOKENS = Metric(
    "kvpilot_delivered_tokens_total",
    _C,
    "Tokens handed to clients' streams; a client that resumes is handed some again.",
    part=_DOOR,
)
FIRST_TOKEN_DELIVERY = Metric(
    "kvpilot_first_token_delivery_seconds",
    _H,
    "From the arrival of a Generate call to the handing over of its first token, by the front door's own clock.",
    _MODEL,
    FIRST_TOKEN_S,
    part=_DOOR,
)
STREAMS_OPEN = Metric("kvpilot_streams_open", _G, "Clients' event streams under way.", part=_DOOR)
QUEUE_JOBS = Metric(
    "kvpilot_queue_jobs",
    _G,
    "Jobs that no live worker has, by priority (high, normal, low), read from the job store at each scrape. All front"
    " doors say the same: take the max.",
    ("model", "priority"),
    part=_DOOR,
)
QUEUE_AGE = Metric(
    "kvpilot_queue_oldest_age_seconds",
    _G,
    "How long the oldest of those jobs has waited; 0 where there is none.",
    ("model", "priority"),
    part=_DOOR,
)
WORKERS_LIVE = Metric(
    "kvpilot_workers_live", _G, "Workers whose heartbeat the job store has, by model.", _MODEL, part=_DOOR
)

# -- steering ----------------------------------------------------------------------------------------------------------

_STEER = Part.STEERING
STEERING_STREAMS = Metric("kvpilot_steering_streams", _G, "Workers attached to this controller.", part=_STEER)
STEERING_MODE = Metric(
    "kvpilot_steering_mode",
    _G,
    "1 for the mode in force (off, advisory, active), 0 for the others.",
    ("mode",),
    part=_STEER,
)
OVERRIDES = Metric("kvpilot_overrides", _G, "Requests that an operator holds.", part=_STEER)
PLAN_TIME = Metric(
    "kvpilot_plan_seconds", _H, "Duration of a planning tick, of one worker.", buckets=PLAN_S, part=_STEER
)
PLANNED_REQUESTS = Metric(
    "kvpilot_planned_requests_total", _C, "Live requests that planning ticks looked at.", part=_STEER
)
DECISIONS = Metric(
    "kvpilot_decisions_total",
    _C,
    "Decisions of planning ticks, by who decided (bundle, rule) and what came of them: keep, advised, sent, or `held`"
    " back, since the worker has lately refused that pipeline.",
    ("decided_by", "outcome"),
    part=_STEER,
)
DIRECTIVES = Metric(
    "kvpilot_directives_total",
    _C,
    "Directives sent, by who ordered them (controller, operator) and why (as in kvpilot_switches_total).",
    ("ordered_by", "reason"),
    part=_STEER,
)
ANSWERS = Metric(
    "kvpilot_directive_answers_total",
    _C,
    "What became of directives: `ack`, `nack` or `none`, which is no answer in time; code is the refusal's gRPC code,"
    " OK for an Ack.",
    ("answer", "code"),
    part=_STEER,
)
ANSWER_TIME = Metric(
    "kvpilot_directive_answer_seconds",
    _H,
    "From sending a directive to its Ack or Nack.",
    buckets=CALL_S,
    part=_STEER,
)
PREDICTED_DIVERGENCE = Metric(
    "kvpilot_predicted_divergence_nats",
    _H,
    "Divergence predicted of each pipeline that a bundle chose, to move to or to stay with, nats per token; once per"
    " report of a request.",
    ("family",),
    NATS,
    part=_STEER,
)
BOUNDED_AUDITS = Metric(
    "kvpilot_bounded_audits_total",
    _C,
    "Audits of decisions that came with a bound.",
    ("bundle", "family"),
    part=_STEER,
)
BOUND_VIOLATIONS = Metric(
    "kvpilot_bound_violations_total",
    _C,
    "Of these, those that measured more than the bound.",
    ("bundle", "family"),
    part=_STEER,
)
BUNDLE_INFO = Metric(
    "kvpilot_bundle_info",
    _G,
    "1; names the bundle in force (`active`) and the one beside it (`shadow`).",
    ("place", "bundle"),
    part=_STEER,
)
BUNDLE_ALPHA = Metric(
    "kvpilot_bundle_alpha",
    _G,
    "Share of audits that may exceed their bound, as the active bundle promises.",
    part=_STEER,
)
BUNDLES_REFUSED = Metric(
    "kvpilot_bundles_refused", _G, "Bundles that a pointer shows and this controller cannot use.", part=_STEER
)
BUNDLE_SWAPS = Metric(
    "kvpilot_bundle_swaps_total", _C, "Times that another bundle came in force, the first one included.", part=_STEER
)
GUARD_ALARMS = Metric("kvpilot_guard_alarms_total", _C, "Times that a bundle's bounds were found broken.", part=_STEER)
GUARD_ROLLBACKS = Metric("kvpilot_guard_rollbacks_total", _C, "Bundles taken out of force for it.", part=_STEER)
GUARD_DRIFTS = Metric(
    "kvpilot_guard_drifts_total", _C, "Times that what is measured moved away from what is predicted.", part=_STEER
)
JOURNAL_PENDING = Metric(
    "kvpilot_journal_pending_entries", _G, "Entries of the decision log that wait for the job store.", part=_STEER
)
JOURNAL_DROPPED = Metric(
    "kvpilot_journal_dropped_entries_total", _C, "Entries lost because it was away for too long.", part=_STEER
)

# -- servers and processes ---------------------------------------------------------------------------------------------

CALLS = Metric(
    "kvpilot_grpc_calls_total", _C, "gRPC calls that ended, by status.", ("service", "method", "code"), part=Part.SERVER
)
CALL_TIME = Metric(
    "kvpilot_grpc_call_seconds",
    _H,
    "Duration of gRPC calls; of streams, their whole life.",
    ("service", "method"),
    CALL_S,
    part=Part.SERVER,
)
CALLS_OPEN = Metric("kvpilot_grpc_calls_open", _G, "gRPC calls under way.", ("service", "method"), part=Part.SERVER)
BUILD_INFO = Metric(
    "kvpilot_build_info",
    _G,
    "1; names version, kind (controller, worker) and process.",
    ("version", "kind", "process"),
    part=Part.PROCESS,
)
STORE_ERRORS = Metric(
    "kvpilot_store_errors_total",
    _C,
    "Calls of the job store that failed: `unavailable`, which is waited out, or `refused`.",
    ("kind",),
    part=Part.PROCESS,
)
STORE_CONNECTS = Metric(
    "kvpilot_store_connects_total",
    _C,
    "Connections opened to the job store: a few at the start, more after each loss.",
    part=Part.PROCESS,
)


def _all() -> tuple[Metric, ...]:
    return tuple(value for value in globals().values() if isinstance(value, Metric))


METRICS: Sequence[Metric] = _all()
"""All of them, in the order above."""


def metrics_of(*parts: Part) -> tuple[Metric, ...]:
    """Those of some parts."""
    return tuple(metric for metric in METRICS if metric.part in parts)
