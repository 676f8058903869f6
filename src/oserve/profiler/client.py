"""A client that measures one vLLM engine: completions of exact lengths, and token times."""

import random
import re
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec

from oserve.core import Endpoint, OServeError
from oserve.engines.connectors import connector_of
from oserve.engines.probe import base_url

_REQUEST_TIMEOUT_S = 300.0
_COUNT = re.compile(rb'"completion_tokens":\s*(\d+)')


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineDescription:
    """The facts that an engine reports. Bytes per device; ``None`` if the engine chose the size."""

    model: str
    max_model_len: int
    kv_tokens: int
    kv_cache_memory_bytes: int | None
    version: str


@dataclass
class MeasuredStream:
    """Arrival times of the tokens of one response; an event may carry several tokens."""

    times: list[float] = field(default_factory=list)
    ended: bool = False

    def feed(self, data: bytes, now_s: float) -> None:
        counts = _COUNT.findall(data)
        if counts:
            self.times += [now_s] * (int(counts[-1]) - len(self.times))


class EngineClient:
    """A client of one engine. Use it as an async context manager."""

    def __init__(self, endpoint: Endpoint, *, model: str = "", vocab: int, seed: int = 0) -> None:
        self._base = "http://engine" if endpoint.unix_socket else base_url(endpoint.url)
        self._headers = {"authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {}
        self._endpoint = endpoint
        self._place = endpoint.url or "engine"
        self._model = model
        self._draw = random.Random(seed)
        self._vocab = vocab

    async def __aenter__(self) -> "EngineClient":
        self._session = aiohttp.ClientSession(
            connector=connector_of(self._endpoint, limit=0),
            headers={"content-type": "application/json", **self._headers},
            timeout=aiohttp.ClientTimeout(total=_REQUEST_TIMEOUT_S),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def facts(self) -> EngineDescription:
        """Read the engine's facts; raises OServeError if it does not report its KV capacity."""
        cards = msgspec.json.decode(await self._read("/v1/models"))["data"]
        metrics = (await self._read("/metrics")).decode(errors="replace")
        line = next((row for row in metrics.splitlines() if "cache_config_info{" in row), "")
        labels = dict(re.findall(r'(\w+)="([^"]*)"', line))
        tokens = labels.get("kv_cache_size_tokens", "")
        if not tokens.isdigit():
            # Older engines report blocks only.
            blocks, size = labels.get("num_gpu_blocks", ""), labels.get("block_size", "")
            tokens = str(int(blocks) * int(size)) if blocks.isdigit() and size.isdigit() else ""
        if not tokens:
            raise OServeError(
                "the engine does not report its KV capacity (vllm:cache_config_info in /metrics)",
                place=self._place,
                remedy="measure a vLLM engine itself, not a proxy before it",
            )
        version = msgspec.json.decode(await self._read("/version")).get("version", "")
        self._model = self._model or cards[0]["id"]
        size = labels.get("kv_cache_memory_bytes", "")
        return EngineDescription(
            model=self._model,
            max_model_len=cards[0].get("max_model_len") or 4096,
            kv_tokens=int(tokens),
            kv_cache_memory_bytes=int(size) if size.isdigit() and int(size) > 0 else None,
            version=f"vLLM {version}",
        )

    async def _read(self, path: str) -> bytes:
        try:
            async with self._session.get(self._base + path) as answer:
                body = await answer.read()
                if answer.status == 200:
                    return body
                problem = f"{path} answered with status {answer.status}"
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            problem = f"no answer to {path}: {error or 'timed out'}"
        raise OServeError(
            problem, place=self._place, remedy="check --url; it must be a vLLM engine"
        )

    def prompt(self, tokens: int, draw: random.Random | None = None) -> list[int]:
        """Random token ids, without both ends of the vocabulary, where special tokens are."""
        low, high = self._vocab // 10, max(self._vocab // 10 + 1, 3 * self._vocab // 4)
        return [(draw or self._draw).randrange(low, high) for _ in range(tokens)]

    async def stream(
        self, prompt: list[int], output_tokens: int, seen: MeasuredStream | None = None
    ) -> MeasuredStream:
        """One completion; raises OServeError if the engine refuses or aborts it."""
        seen = seen or MeasuredStream()
        body: dict[str, Any] = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            # Usage tells how many tokens an event carries: the engine merges those that wait.
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        try:
            async with self._session.post(
                self._base + "/v1/completions", data=msgspec.json.encode(body)
            ) as answer:
                if answer.status != 200:
                    text = (await answer.read())[:200].decode(errors="replace")
                    raise self._failed(f"status {answer.status}: {text}")
                rest = b""
                async for data in answer.content.iter_any():
                    events, mark, rest = (rest + data).rpartition(b"\n\n")
                    if mark:
                        seen.feed(events, time.perf_counter())
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise self._failed(f"{type(error).__name__}: {error}") from None
        finally:
            seen.ended = True
        if len(seen.times) < output_tokens:
            raise self._failed(f"{len(seen.times)} of {output_tokens} tokens came")
        return seen

    def _failed(self, what: str) -> OServeError:
        return OServeError(
            f"a completion failed: {what}", place=self._place, remedy="read the engine's log"
        )
