"""Reports on their way to a controller."""

from __future__ import annotations

from kvpilot.v1 import policy_pb2


class ReportBox:
    """Reports not sent yet, newest state of each request only, so that a slow or lost stream costs bounded memory."""

    def __init__(self) -> None:
        self._worker: policy_pb2.WorkerState | None = None
        self._newest: policy_pb2.Report | None = None  # the last report put in, until its news are taken
        self._news: dict[str, policy_pb2.RequestState] = {}
        self._ended: dict[str, None] = {}
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
        for request_id in report.ended_request_ids:
            self._news.pop(request_id, None)
            self._latest.pop(request_id, None)
            self._ended[request_id] = None

    def restart(self, hello: policy_pb2.Hello) -> None:
        """Prepares for a new stream: the last known state of all that Hello names as alive is news again.

        A state from before the epoch that Hello gives is left out; the engine's next report brings the present one.
        """
        epochs = {entry.request_id: entry.epoch for entry in hello.epochs}
        self._ended.clear()
        self._latest = {request_id: state for request_id, state in self._latest.items() if request_id in epochs}
        self._news = {
            request_id: state for request_id, state in self._latest.items() if state.epoch == epochs[request_id]
        }

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
