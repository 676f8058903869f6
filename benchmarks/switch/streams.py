"""Streams of greedy text whose chunks are timed: the load beside which switches are measured."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp

BODY: dict[str, Any] = {
    "prompt": [5] * 32,
    "max_tokens": 48,
    "temperature": 0,
    "ignore_eos": True,
    "stream": True,
}


@dataclass
class Told:
    """What a stream said. ``whole``: it ended in form; ``reason``: why it did not."""

    text: str = ""
    whole: bool = False
    reason: str = "it broke off"


@dataclass
class Seen:
    """What streams have shown. Each gap and each wait with the time of its end (``time.time``)."""

    gaps: list[tuple[float, float]] = field(default_factory=list)
    firsts: list[tuple[float, float]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    sent: int = 0
    failed: int = 0

    async def ask(self, session: aiohttp.ClientSession, url: str, body: Mapping[str, Any]) -> Told:
        """Send one request and read its stream, as far as it comes."""
        self.sent += 1
        told, last_s, waits = Told(), time.time(), self.firsts
        try:
            async with session.post(url + "/v1/completions", json=body) as answer:
                async for line in answer.content:
                    told.whole = told.whole or b"[DONE]" in line
                    if not line.startswith(b"data: {"):
                        continue
                    now_s = time.time()
                    waits.append((now_s, now_s - last_s))
                    last_s, waits = now_s, self.gaps
                    event = json.loads(line[6:])
                    told.text += "".join(item["text"] for item in event.get("choices", ()))
        except (aiohttp.ClientError, OSError) as error:
            told.whole, told.reason = False, str(error) or told.reason
        if told.whole:
            self.texts.append(told.text)
        self.failed += not told.whole
        return told

    def longest_gap_s(self, start_s: float, end_s: float) -> float:
        """Between two chunks of a stream, the later of which came in this time."""
        return max((gap for at_s, gap in self.gaps if start_s <= at_s <= end_s), default=0.0)

    def longest_first_s(self, start_s: float, end_s: float) -> float:
        """The longest wait for a first chunk that came in this time."""
        return max((took for at_s, took in self.firsts if start_s <= at_s <= end_s), default=0.0)
