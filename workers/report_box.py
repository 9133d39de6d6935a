"""Reports on their way to a controller."""

from __future__ import annotations

from kvpilot.v1 import policy_pb2


class ReportBox:
    """Reports not sent yet, newest state of each request only, so that a slow or lost stream costs bounded memory.

    Requests that end while there is no stream are forgotten: the next Hello does not name them.
    """

    def __init__(self) -> None:
        self._worker: policy_pb2.WorkerState | None = None
        self._newest: policy_pb2.Report | None = None  # the last report put in, until its news are taken
        self._news: dict[str, policy_pb2.RequestState] = {}
        self._streaming = False
        self._ended: dict[str, None] = {}  # to be told on the present stream
        self._offered: frozenset[str] = frozenset()  # named by the Hello of a stream that is being opened
        self._ended_since: dict[str, None] = {}  # those of them that have ended since
        self._latest: dict[str, policy_pb2.RequestState] = {}

    def put(self, report: policy_pb2.Report) -> None:
        """Adds a report of the engine."""
        self._newest = report
        if report.HasField("worker"):
            self._worker = report.worker
        for state in report.requests:
            before = self._news.get(state.request_id)
            if before is not None and before.signals.steps and not state.signals.steps:
                measured, state = before.signals, _copy(state)  # nothing was decoded since: what was measured holds
                state.signals.CopyFrom(measured)
            self._news[state.request_id] = self._latest[state.request_id] = state
            self._ended.pop(state.request_id, None)
            self._ended_since.pop(state.request_id, None)
        for request_id in report.ended_request_ids:
            self._news.pop(request_id, None)
            self._latest.pop(request_id, None)
            if self._streaming:
                self._ended[request_id] = None
            if request_id in self._offered:
                self._ended_since[request_id] = None

    def offer(self, hello: policy_pb2.Hello) -> None:
        """Notes that a stream is being opened with this Hello, in place of an earlier one that came to nothing.

        Those of its requests that end before :meth:`restart` are news to the new stream, whatever the old one is told.
        """
        self._offered = frozenset(entry.request_id for entry in hello.epochs)
        self._ended_since.clear()

    def restart(self, hello: policy_pb2.Hello) -> None:
        """Prepares for a new stream: the last known state of all that Hello names as alive is news again.

        A state from before the epoch that Hello gives is left out; the engine's next report brings the present one.
        What has ended since Hello was offered is told as ended.
        """
        epochs = {entry.request_id: entry.epoch for entry in hello.epochs}
        self._streaming = True
        self._ended = {request_id: None for request_id in self._ended_since if request_id in epochs}
        self._offered = frozenset()
        self._ended_since.clear()
        self._latest = {request_id: state for request_id, state in self._latest.items() if request_id in epochs}
        self._news = {
            request_id: state for request_id, state in self._latest.items() if state.epoch == epochs[request_id]
        }

    def stop(self) -> None:
        """The stream has ended, and there is no other yet."""
        self._streaming = False
        self._ended.clear()

    def take(self) -> policy_pb2.Report | None:
        """All news as one report, without its number; None if there are none."""
        if self._newest is None and not self._news and not self._ended:
            return None
        report = policy_pb2.Report(
            worker=self._worker, requests=self._news.values(), ended_request_ids=self._ended.keys()
        )
        if self._newest is not None and self._newest.HasField("time"):
            report.time.CopyFrom(self._newest.time)
        else:
            report.time.GetCurrentTime()
        self._newest = None
        self._news.clear()
        self._ended.clear()
        return report


def _copy(state: policy_pb2.RequestState) -> policy_pb2.RequestState:
    """A copy that may be changed; the original belongs to the engine's report."""
    copy = policy_pb2.RequestState()
    copy.CopyFrom(state)
    return copy
