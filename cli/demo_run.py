"""One request of the demo: what came of it, and its part of the summary."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cli import text
from cli.document import switch_document
from kvpilot.result import Result

SWITCH_FIELDS = ("at_token", "from", "to", "reason", "ordered_by", "stall_ms")


@dataclass
class Run:
    """One request of the demo as it goes."""

    name: str
    answer: str | None = None
    result: Result = field(default_factory=Result)
    first_token_at: float = 0.0

    @property
    def fact_found(self) -> bool | None:
        """Whether the text contains what it must; None where nothing is asked."""
        return None if self.answer is None else self.answer in self.result.text

    @property
    def steered_midway(self) -> bool:
        """Whether the controller switched it in the middle of its generation."""
        total = len(self.result.token_ids)
        return any(
            0 < switch.at_token < total and text.orderer(switch.ordered_by) == "controller"
            for switch in self.result.switches
        )

    def document(self) -> dict[str, Any]:
        """Its part of the summary."""
        cache, timings = self.result.cache, self.result.timings
        tokens = len(self.result.token_ids)
        return {
            "name": self.name,
            "tokens": tokens,
            "prompt_tokens": self.result.usage.prompt_tokens,
            "reused_prompt_tokens": self.result.usage.reused_prompt_tokens,
            "tokens_per_s": round((tokens - 1) * 1000 / timings.decode_ms, 2) if timings.decode_ms else 0.0,
            "peak_device_bytes": cache.peak_device_bytes,
            "end_device_bytes": cache.device_bytes,
            "full_cache_bytes": cache.full_cache_bytes,
            "peak_device_bytes_16bit": cache.peak_device_bytes_16bit,
            "full_cache_bytes_16bit": cache.full_cache_bytes_16bit,
            "finish_reason": str(self.result.finish_reason),
            "fact_found": self.fact_found,
            "text": self.result.text,
            "switches": [
                {key: value for key, value in switch_document(switch).items() if key in SWITCH_FIELDS}
                for switch in self.result.switches
            ],
        }
