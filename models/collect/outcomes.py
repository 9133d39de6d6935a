"""Documents from what was served: prompts of finished jobs, continued by the tokens they generated."""

from __future__ import annotations

from collections.abc import AsyncIterator

from kvpilot.bus import Bus, JobNotFoundError
from kvpilot.result import FinishReason, Result
from kvpilot.v1 import generation_pb2
from models.collect.corpus import Skipped
from models.collect.document import CHAT, PROSE, Document, Piece, Turn, name_by_beginning, name_of_chat, safe_name

_PAGE = 256
_LEAST_GENERATED_TOKENS = 16


async def read_outcomes(bus: Bus, model: str, skipped: Skipped) -> AsyncIterator[Document]:
    """Finished jobs of a model whose requests are still in the job store, oldest first.

    Turns of one session, and prompts that begin alike, get one source, and so one split.
    """
    after = "0-0"
    while page := await bus.outcomes(after, _PAGE):
        for name, outcome in page:
            after = name
            try:
                request = (await bus.record(outcome.job_id)).job.request
                if request.model != model:
                    skipped.add("jobs of another model")
                    continue
                result = Result.of(await bus.history(outcome.job_id))
            except JobNotFoundError:
                skipped.add("jobs that have expired")
                continue
            if request.HasField("replay"):
                skipped.add("replays")
            elif result.finish_reason in (None, FinishReason.FAILED) or len(result.token_ids) < _LEAST_GENERATED_TOKENS:
                skipped.add("jobs with too few generated tokens")
            else:
                yield document_of(outcome.job_id, request, tuple(result.token_ids))


def document_of(job_id: str, request: generation_pb2.GenerateRequest, generated: tuple[int, ...]) -> Document:
    """A job's prompt and what it generated."""
    turns = _turns(request)
    text: Piece = tuple(request.token_ids.ids) if request.WhichOneof("input") == "token_ids" else request.prompt
    name = f"job/{source_of_request(request)}#{job_id}"
    return Document(name, CHAT if turns else PROSE, text, generated, turns)


def source_of_request(request: generation_pb2.GenerateRequest) -> str:
    """What all requests share that are turns of one session, or whose prompts begin alike."""
    if request.session_id:
        return f"session-{safe_name(request.session_id)}"
    if turns := _turns(request):
        return name_of_chat(turns)
    if request.WhichOneof("input") == "prompt":
        return name_by_beginning(request.prompt)
    return name_by_beginning(" ".join(str(token) for token in request.token_ids.ids[:256]))


def _turns(request: generation_pb2.GenerateRequest) -> tuple[Turn, ...]:
    return tuple((message.role, message.content) for message in request.chat.messages)
