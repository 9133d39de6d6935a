"""What clients are told of a request, as the API's messages."""

from __future__ import annotations

from kvpilot.v1 import common_pb2, generation_pb2
from workers.engine.sampler import Choice
from workers.engine.sequence import Sequence


def token(choice: Choice) -> generation_pb2.Token:
    """A token that was chosen, and those that might have been."""
    return generation_pb2.Token(
        id=choice.token_id,
        logprob=choice.logprob,
        top=[generation_pb2.TopLogprob(id=token_id, logprob=value) for token_id, value in choice.top],
    )


def finished(
    seq: Sequence, reason: generation_pb2.FinishReason, cache_bytes: common_pb2.CacheBytes
) -> generation_pb2.Finished:
    """The end of a request whose cache took that."""
    queued_s = seq.admit_time_s - seq.accept_time_s if seq.accept_time_s else 0.0
    return generation_pb2.Finished(
        reason=reason,
        problem=seq.problem,
        usage=generation_pb2.Usage(
            prompt_tokens=seq.prompt_tokens,
            reused_prompt_tokens=seq.reused_prompt_tokens,
            generated_tokens=seq.generated,
            preemptions=seq.preemptions,
        ),
        cache=cache_bytes,
        timings=generation_pb2.Timings(
            queued_ms=max(0.0, queued_s) * 1e3,
            prefill_ms=max(0.0, seq.first_token_time_s - seq.admit_time_s) * 1e3,
            decode_ms=(seq.last_token_time_s - seq.first_token_time_s) * 1e3,
        ),
        switches=seq.switches,
        pipeline=seq.pipeline.text,
    )
