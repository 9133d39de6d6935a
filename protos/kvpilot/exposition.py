"""A process's metrics as instruments, and their page for Prometheus.

Recording is done by who knows: counters and histograms where something happens, and what a process holds in memory
anyway is looked at only when somebody scrapes::

    instruments = Instruments(Part.WORKER, Part.PROCESS)
    instruments.counter(metrics.GENERATED_TOKENS).labels("smollm2").inc()
    instruments.show(metrics.REQUESTS_RUNNING, lambda: [(("smollm2",), len(running))])
    async with instruments.serving("127.0.0.1:0") as address:
        ...

The page is served by a thread of its own, so functions given to :meth:`Instruments.show` must be safe to call from one.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import TypeAlias

import prometheus_client
import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from kvpilot.metrics import Kind, Metric, Part, metrics_of
from kvpilot.process import split_address

log = structlog.get_logger(__name__)

Samples: TypeAlias = Iterable[tuple[tuple[str, ...], float]]
"""Values of a metric's labels, in their order, and its value for them."""

prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]  # a third series for each, of no use here


class Instruments:
    """The metrics of one process, or of one part of it.

    Args:
        parts: what it is; metrics of others are refused.
    """

    def __init__(self, *parts: Part) -> None:
        self.metrics = metrics_of(*parts)
        self.registry = CollectorRegistry()
        self._made: dict[Metric, Counter | Gauge | Histogram | None] = {}
        prometheus_client.ProcessCollector(registry=self.registry)
        prometheus_client.PlatformCollector(registry=self.registry)

    def counter(self, metric: Metric) -> Counter:
        """The counter of that name."""
        made = self._make(metric, Kind.COUNTER)
        assert isinstance(made, Counter)
        return made

    def gauge(self, metric: Metric) -> Gauge:
        """The gauge of that name."""
        made = self._make(metric, Kind.GAUGE)
        assert isinstance(made, Gauge)
        return made

    def histogram(self, metric: Metric) -> Histogram:
        """The histogram of that name."""
        made = self._make(metric, Kind.HISTOGRAM)
        assert isinstance(made, Histogram)
        return made

    def show(self, metric: Metric, look: Callable[[], Samples]) -> None:
        """Has a gauge or counter made at each scrape of what ``look`` finds then.

        Raises:
            ValueError: it is a histogram, or was made or shown before.
        """
        if metric.kind is Kind.HISTOGRAM or self._ours(metric) in self._made:
            raise ValueError(f"metric {metric.name}: a gauge or counter that was not made yet is needed")
        self._made[metric] = None
        self.registry.register(_Shown(metric, look))

    @property
    def unused(self) -> list[str]:
        """Names of metrics that nothing records."""
        return [metric.name for metric in self.metrics if metric not in self._made]

    def _make(self, metric: Metric, kind: Kind) -> Counter | Gauge | Histogram:
        if metric.kind is not kind:
            raise ValueError(f"metric {metric.name} is a {metric.kind}, no {kind}")
        if self._ours(metric) in self._made:
            made = self._made[metric]
            if made is None:
                raise ValueError(f"metric {metric.name} is made at each scrape already")
            return made
        name, said, labels, registry = metric.name, metric.help, metric.labels, self.registry
        match kind:
            case Kind.COUNTER:
                made = Counter(name, said, labels, registry=registry)
            case Kind.GAUGE:
                made = Gauge(name, said, labels, registry=registry)
            case Kind.HISTOGRAM:
                made = Histogram(name, said, labels, buckets=metric.buckets, registry=registry)
        self._made[metric] = made
        return made

    def _ours(self, metric: Metric) -> Metric:
        if metric not in self.metrics:
            raise ValueError(f"metric {metric.name} is of part {metric.part!r}; this process is not")
        return metric

    @contextlib.asynccontextmanager
    async def serving(self, listen: str) -> AsyncIterator[str]:
        """Serves the page for as long as the context lasts; gives its ``host:port``, empty where ``listen`` is.

        Raises:
            OSError: the address cannot be had.
        """
        if not listen:
            yield ""
            return
        host, port = split_address(listen)
        try:
            server, thread = prometheus_client.start_http_server(port, host.strip("[]"), self.registry)
        except OSError as error:
            raise OSError(f"metrics_listen {listen!r}: {error.strerror or error}") from error
        address = f"{host}:{server.server_port}"
        log.info("metrics", url=f"http://{address}/metrics")
        try:
            yield address
        finally:
            await asyncio.to_thread(server.shutdown)  # it looks twice a second
            server.server_close()
            thread.join()


class _Shown(Collector):
    """A metric that is made at each scrape."""

    def __init__(self, metric: Metric, look: Callable[[], Samples]) -> None:
        self._metric = metric
        self._look = look
        self._failed = False

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        metric = self._metric
        kind = CounterMetricFamily if metric.kind is Kind.COUNTER else GaugeMetricFamily
        family = kind(metric.name, metric.help, labels=metric.labels)
        try:
            for labels, value in self._look():
                family.add_metric(labels, value)
        except Exception as error:  # the others are still worth having
            if not self._failed:
                log.error("metric left out", metric=metric.name, exc_info=error)
            self._failed = True
            return
        self._failed = False
        yield family
