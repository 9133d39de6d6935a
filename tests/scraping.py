"""Reads a process's metrics as Prometheus would."""

from __future__ import annotations

import asyncio
import urllib.request

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample


class Page:
    """One scrape."""

    def __init__(self, text: str) -> None:
        self.families = {family.name: family for family in text_string_to_metric_families(text)}
        self.samples: list[Sample] = [sample for family in self.families.values() for sample in family.samples]

    def value(self, name: str, **labels: str) -> float:
        """Sum of the samples of that name with these labels."""
        return sum(sample.value for sample in self.named(name) if labels.items() <= sample.labels.items())

    def named(self, name: str) -> list[Sample]:
        return [sample for sample in self.samples if sample.name == name]


async def scrape(address: str) -> Page:
    """The metrics that are served at ``host:port``."""

    def read() -> str:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=20) as answer:
            text: str = answer.read().decode()
            return text

    return Page(await asyncio.to_thread(read))
