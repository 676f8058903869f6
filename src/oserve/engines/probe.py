"""Probes a running server: its health, its models, its load.

It speaks HTTP over a Unix socket or TCP. Every probe has a time limit. A server that does not
answer gives ``None`` or ``False``, never an exception.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from urllib.parse import urlsplit

import aiohttp
import msgspec

from oserve.core import Endpoint, EngineWork
from oserve.engines.connectors import connector_of

_MAX_BODY_BYTES = 8 * 1024 * 1024
_NO_ANSWER = (aiohttp.ClientError, OSError, TimeoutError, ValueError)
_GAUGES = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:kv_cache_usage_perc": "kv_cache_usage",
}
# Histograms. One observation per step: the prompt and output tokens that it computed. One per
# output token but each request's first: the time since the token before.
_COUNTERS = {
    "vllm:prompt_tokens_total": "all_prompt_tokens",
    "vllm:iteration_tokens_total_count": "steps",
    "vllm:iteration_tokens_total_sum": "step_tokens",
    "vllm:generation_tokens_total": "output_tokens",
    "vllm:inter_token_latency_seconds_count": "gaps",
    "vllm:inter_token_latency_seconds_sum": "gap_s",
}
# An engine's core answers only after its present step.
_ANSWER_LIMIT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLoad:
    """Requests in the engine, the used fraction of its KV cache, tokens and work since its start.

    vLLM counts tokens and iterations only of steps that yield a token: while it computes one long
    prompt in chunks, only the use of its cache grows.
    """

    running: int = 0
    waiting: int = 0
    kv_cache_usage: float = 0.0
    tokens: int = 0
    work: EngineWork | None = None

    @property
    def counts(self) -> tuple[float, ...]:
        """Figures that change only when the engine's core makes progress."""
        return (self.running, self.waiting, self.kv_cache_usage, self.tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A model that a server lists; ``max_model_len`` (tokens) is 0 if it does not say."""

    name: str
    max_model_len: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeReply:
    """A server's reply; ``status`` 0 and ``why`` if no whole reply came in time."""

    status: int
    body: bytes = b""
    why: str = ""


class _Card(msgspec.Struct):
    id: str
    max_model_len: int | None = None


class _Cards(msgspec.Struct):
    data: list[_Card]


_CARDS_DECODER = msgspec.json.Decoder(_Cards)


class Probe:
    """Probes one server. Use as an async context manager, or call ``close``."""

    def __init__(self, endpoint: Endpoint, *, timeout_s: float = 5.0) -> None:
        self._endpoint = endpoint
        self._timeout_s = timeout_s
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> "Probe":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Disconnect."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def healthy(self) -> bool:
        """Whether ``/health``, or without it ``/v1/models``, answers 200."""
        status, _ = await self._ask("GET", "/health")
        if status == 404:
            status, _ = await self._ask("GET", "/v1/models")
        return status == 200

    async def models(self) -> tuple[ServedModel, ...] | None:
        """The models that ``/v1/models`` lists; ``None`` without an answer."""
        status, body = await self._ask("GET", "/v1/models")
        if status != 200:
            return None
        return served_models(body)

    async def load(self) -> EngineLoad | None:
        """vLLM's own figures from ``/metrics``; ``None`` without an answer."""
        status, body = await self._ask("GET", "/metrics")
        return parse_load(body.decode(errors="replace")) if status == 200 else None

    async def alive(self) -> bool | None:
        """Whether the engine's core answers; ``None`` if the server has no route that asks it.

        vLLM's control routes ask the core. Its API process answers ``/health`` and ``/metrics``
        alone, even while the core hangs.
        """
        status, _ = await self._ask("GET", "/is_sleeping", timeout_s=_ANSWER_LIMIT_S)
        return None if status in {404, 405} else status == 200

    async def complete(
        self, model: str, prompt: str | list[int], max_tokens: int, timeout_s: float
    ) -> bool:
        """One greedy completion. An engine's first one makes it allocate memory."""
        body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        status, _ = await self._ask("POST", "/v1/completions", body, timeout_s)
        return status == 200

    async def ask(
        self,
        method: str,
        path: str,
        body: Mapping[str, object] | None = None,
        timeout_s: float | None = None,
    ) -> ProbeReply:
        """Any request; ``path`` is from the server's root."""
        parts = urlsplit(self._endpoint.url)
        return await self._send(method, f"{parts.scheme}://{parts.netloc}{path}", body, timeout_s)

    async def _ask(
        self,
        method: str,
        path: str,
        body: Mapping[str, object] | None = None,
        timeout_s: float | None = None,
    ) -> tuple[int, bytes]:
        """Status and body; status 0 if no whole reply came in time."""
        base = "http://engine" if self._endpoint.unix_socket else base_url(self._endpoint.url)
        answer = await self._send(method, base + path, body, timeout_s)
        return answer.status, answer.body

    async def _send(
        self, method: str, url: str, body: Mapping[str, object] | None, timeout_s: float | None
    ) -> ProbeReply:
        limit_s = timeout_s or self._timeout_s
        try:
            if self._session is None:
                self._session = self._connect()
            async with self._session.request(
                method,
                url,
                json=body,
                timeout=aiohttp.ClientTimeout(total=limit_s),
                allow_redirects=False,
            ) as answer:
                return ProbeReply(status=answer.status, body=await _read(answer))
        except TimeoutError:
            return ProbeReply(status=0, why=f"it gave no answer within {limit_s:.0f} s")
        except aiohttp.ClientConnectorError as error:
            return ProbeReply(status=0, why=f"cannot connect: {error.os_error or error}")
        except _NO_ANSWER as error:
            return ProbeReply(status=0, why=str(error) or type(error).__name__)

    def _connect(self) -> aiohttp.ClientSession:
        headers = dict(self._endpoint.headers)
        if self._endpoint.api_key:
            headers["Authorization"] = f"Bearer {self._endpoint.api_key}"
        # A server behind a URL may be another's; ours gets what the prober needs.
        connector = connector_of(self._endpoint, limit=100 if self._endpoint.unix_socket else 2)
        return aiohttp.ClientSession(connector=connector, headers=headers)


def served_models(body: bytes) -> tuple[ServedModel, ...]:
    """The models that a reply of ``/v1/models`` lists."""
    try:
        cards = _CARDS_DECODER.decode(body)
    except msgspec.DecodeError:
        return ()
    return tuple(
        ServedModel(name=card.id, max_model_len=card.max_model_len or 0) for card in cards.data
    )


async def _read(answer: aiohttp.ClientResponse) -> bytes:
    parts, size = [], 0
    async for part in answer.content.iter_any():
        size += len(part)
        if size > _MAX_BODY_BYTES:
            raise ValueError(f"the reply exceeds {_MAX_BODY_BYTES} bytes")
        parts.append(part)
    return b"".join(parts)


def base_url(url: str) -> str:
    """The server's root, without a trailing slash or ``/v1``."""
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def parse_load(metrics: str) -> EngineLoad:
    """Gauges and counters of a Prometheus page; those of several engines are added up."""
    names = _GAUGES | _COUNTERS
    sums = dict.fromkeys(names.values(), 0.0)
    for name, field in names.items():
        start = 0
        # A page holds thousands of histogram lines: search for these instead of parsing all.
        while (start := metrics.find(f"\n{name}", start)) >= 0:
            end = metrics.find("\n", start + 1)
            line = metrics[start + 1 : end if end >= 0 else len(metrics)]
            start += 1
            if line[len(name) : len(name) + 1] not in {"{", " "}:
                continue  # a longer name with the same prefix
            value = line[line.rindex("}") + 1 if "}" in line else len(name) :].split()
            try:
                sums[field] += float(value[0])
            except (IndexError, ValueError):
                continue
    return EngineLoad(
        running=int(sums["running"]),
        waiting=int(sums["waiting"]),
        kv_cache_usage=sums["kv_cache_usage"],
        tokens=int(sums["all_prompt_tokens"] + sums["output_tokens"]),
        work=_work(sums) if sums["steps"] else None,
    )


def _work(sums: Mapping[str, float]) -> EngineWork:
    output_tokens, gaps = int(sums["output_tokens"]), int(sums["gaps"])
    return EngineWork(
        steps=int(sums["steps"]),
        prompt_tokens=max(0, int(sums["step_tokens"]) - output_tokens),
        # The first token of each request ends its prompt and has no gap before it.
        prompts=max(0, output_tokens - gaps),
        output_tokens=output_tokens,
        gaps=gaps,
        gap_s=sums["gap_s"],
    )
