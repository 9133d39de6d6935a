"""``top --once`` from real protos."""

from __future__ import annotations

from rich.console import Console

from cli.top import WIDE, Snapshot, render
from kvpilot.v1 import common_pb2, operator_pb2, policy_pb2

MIB = 1 << 20


def snapshot() -> Snapshot:
    worker = operator_pb2.Worker()
    worker.hello.worker = "worker-0"
    worker.hello.model.name = "tiny"
    worker.hello.far_horizons_tokens.extend([128, 512])
    worker.hello.tiers.add(name="device", budget_bytes=64 * MIB)
    worker.hello.tiers.add(name="host", budget_bytes=128 * MIB)
    worker.state.running, worker.state.tokens_per_s, worker.state.step_ms = 2, 41.5, 24.0
    worker.state.tiers.add(name="device", used_bytes=16 * MIB, budget_bytes=64 * MIB)

    steered = operator_pb2.LiveRequest(worker="worker-0")
    state = steered.state
    state.request_id = "0123456789abcdef"
    state.scenario = common_pb2.SCENARIO_LONG_CONTEXT
    state.pipeline, state.loss_class = "kivi(bits=4)", common_pb2.LOSS_CLASS_PERMANENT
    state.prompt_tokens, state.generated_tokens, state.max_tokens = 2100, 40, 96
    state.cache.device_bytes, state.cache.full_cache_bytes = 3 * MIB, 12 * MIB
    state.cache.shadow_bytes = 9 * MIB
    state.signals.steps = 16
    state.signals.far_mass.extend([0.25, 0.06])
    state.signals.attention_entropy, state.signals.next_token_entropy = 0.45, 2.1
    switch = state.last_switch
    switch.at_token, switch.from_pipeline, switch.to_pipeline = 16, "full", "kivi(bits=4)"
    switch.reason, switch.ordered_by = "2116 tokens, device 80% full", common_pb2.ORDERER_CONTROLLER
    steered.decision.pipeline = "kivi(bits=4) | host(recent=256)"
    steered.decision.reason = "device 90% full"
    steered.decision.outcome = operator_pb2.DECISION_OUTCOME_REFUSED
    steered.decision.refusal = "no room on the host tier"

    waiting = operator_pb2.LiveRequest(worker="worker-0", overridden=True)
    waiting.state.request_id, waiting.state.pipeline, waiting.state.prefilling = "job-2", "full", True
    waiting.state.pinned = True
    return Snapshot(operator_pb2.MODE_ADVISORY, [worker], [steered, waiting])


def shown(picture: Snapshot, width: int = 300) -> str:
    console = Console(width=width, record=True, color_system=None)
    with console.capture() as capture:
        console.print(render(picture, "127.0.0.1:7450"))
    return capture.get()


def test_everything_a_person_needs_is_there() -> None:
    said = shown(snapshot())
    for part in (
        "127.0.0.1:7450",
        "mode advisory",
        "1 worker, 2 live requests",
        "41.5 tokens/s",
        "16.0 MiB of 64.0 MiB (25%)",
        "0 B of 128.0 MiB (0%)",  # known from Hello alone
        "…56789abcdef",
        "kivi(bits=4)",
        "long-context, permanent",
        "40/96",
        "+ 2100 prompt",
        "3.0 MiB, 25%",
        "of 12.0 MiB",
        "+ 9.0 MiB",
        ">128: 0.25 >512: 0.06",
        "entropy 0.45, next 2.10 nats",
        "@16 by controller: full → kivi(bits=4)",
        "2116 tokens, device 80% full",
        "refused kivi(bits=4) | host(recent=256) (no room on the host tier)",
        "prefilling",
        "pinned by its client, overridden",
    ):
        assert part in said, part


def test_what_a_bundle_promises_is_shown() -> None:
    picture = snapshot()
    decision = picture.requests[0].decision
    decision.bundle, decision.predicted_divergence, decision.bound = "mine", 0.00412, 0.0131
    assert "bundle mine: predicted 0.0041, bound 0.013 nats" in shown(picture)
    assert "predicted" not in shown(snapshot())  # the rule promises nothing


def test_the_latest_decision_stands_beside_the_last_switch() -> None:
    picture = snapshot()
    decision = picture.requests[0].decision
    decision.CopyFrom(
        operator_pb2.Decision(
            pipeline="kivi(bits=4)",
            reason="stays, switched 24 tokens ago < 32",
            outcome=operator_pb2.DECISION_OUTCOME_KEEP,
        )
    )
    said = shown(picture)
    assert "latest decision" in said
    assert "keep" in said
    assert "stays, switched 24 tokens ago < 32" in said
    assert "@16 by controller: full → kivi(bits=4)" in said


def test_what_audits_say_of_bundles_is_shown() -> None:
    picture = snapshot()
    picture.bundles.extend(
        [
            operator_pb2.Bundle(version="new", active=True, alpha=0.1, audits=120, exceeded=9, mean_log_residual=0.7),
            operator_pb2.Bundle(version="next", shadow=True, alpha=0.1),
            operator_pb2.Bundle(version="torn", refusal="bundle torn: predictor.skops is missing"),
            operator_pb2.Bundle(version="old", audits=1, exceeded=1, alarms=1, drifts=2, mean_log_residual=-0.1),
        ]
    )
    said = shown(picture)
    for line in (
        "bundle new (active): 120 audits, 9 above their bound (8%, 10% promised), measured 2 times what was predicted, "
        "0 drifts, 0 alarms",
        "bundle next (shadow)",
        "bundle torn (refused): bundle torn: predictor.skops is missing",
        "bundle old (not in use): 1 audit, 1 above their bound (100%), measured 0.9 times what was predicted, "
        "2 drifts, 1 alarm",
    ):
        assert line in said, line


def test_narrow_terminals_lose_no_column() -> None:
    said = shown(snapshot(), 80)
    for column in ("request", "pipeline", "tokens", "device", "signals", "decision"):
        assert column in said


def test_empty_controller() -> None:
    said = shown(Snapshot(operator_pb2.MODE_OFF))
    assert "mode off" in said
    assert "0 workers, 0 live requests" in said


def test_controllers_that_do_not_answer_are_named() -> None:
    assert "no answer from a, b: what they steer is missing here" in shown(Snapshot(silent=["a", "b"]))
    assert "no answer" not in shown(Snapshot())


def test_parked_sessions_are_a_line() -> None:
    picture = snapshot()
    assert "parked" not in shown(picture)
    kept = picture.workers[0].state.sessions
    kept.parked, kept.host_bytes, kept.disk_bytes = 3, 12 * MIB, 40 * MIB
    kept.restored_turns, kept.restored_tokens = 1, 640
    line = (
        "worker-0: 3 sessions parked, 12.0 MiB on the host, 40.0 MiB on disk; 1 turn resumed, 640 tokens not computed"
    )
    assert line in shown(picture)
    assert "damaged" not in shown(picture)
    kept.corrupt_pieces = 2
    assert "2 damaged on disk" in shown(picture)


def test_what_lower_tiers_took_is_a_line_of_the_worker_and_of_the_request() -> None:
    picture = snapshot()
    assert "in time" not in shown(picture)
    told = policy_pb2.Recalls(
        tiers=[
            policy_pb2.TierRecalls(name="host", there_blocks=60, ahead_blocks=20, waited_blocks=15, in_place_blocks=5),
            policy_pb2.TierRecalls(name="disk", ahead_blocks=1),
        ],
        moved=[
            policy_pb2.MovedBytes(from_tier="device", to_tier="device", bytes=9 * MIB),
            policy_pb2.MovedBytes(from_tier="device", to_tier="host", bytes=7 * MIB),
            policy_pb2.MovedBytes(from_tier="host", to_tier="device", bytes=3 * MIB),
        ],
        read_blocks=1,
        skipped_blocks=3,
    )
    picture.workers[0].state.recalls.CopyFrom(told)
    line = (
        "worker-0: 80% of 100 blocks asked of host there in time; 100% of 1 block asked of disk there in time; moved"
        " device → host 7.0 MiB, host → device 3.0 MiB; queries read 25% of the blocks they may skip"
    )
    assert line in shown(picture)
    assert "brought" not in shown(picture)
    picture.requests[0].state.recalls.CopyFrom(told)
    for width in (300, WIDE, 80):  # a table, the narrowest one, and paragraphs
        said = shown(picture, width)
        assert "80% there in time" in said  # 81 of 101
        assert "3.0 MiB brought" in said
