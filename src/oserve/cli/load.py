"""Replays requests against an OpenAI-compatible server, open loop, and checks every answer.

A stream counts as complete only if each event parses, a finish reason came, the engine reported
the number of tokens that was asked for, and ``[DONE]`` closed it.
"""

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec

from oserve.core import OServeError
from oserve.traces import Outcome, OutcomeStatus, TraceRequest

_WORDS = [
    "time",
    "year",
    "people",
    "way",
    "day",
    "man",
    "thing",
    "woman",
    "life",
    "child",
    "world",
    "school",
    "state",
    "family",
    "student",
    "group",
    "country",
    "problem",
    "hand",
    "part",
    "place",
    "case",
    "week",
    "company",
    "system",
    "program",
    "question",
    "work",
    "night",
    "point",
    "home",
    "water",
    "room",
    "mother",
    "area",
    "money",
    "story",
    "fact",
    "month",
    "lot",
    "right",
    "study",
    "book",
    "eye",
    "job",
    "word",
    "side",
    "kind",
    "head",
    "house",
    "friend",
    "father",
    "power",
    "hour",
    "game",
    "line",
    "end",
    "member",
    "law",
    "car",
    "city",
    "name",
    "team",
    "minute",
    "idea",
    "kid",
    "body",
    "back",
    "parent",
    "face",
    "level",
    "office",
    "door",
    "health",
    "person",
    "art",
    "war",
    "history",
    "party",
    "result",
]
_SAMPLE_WORDS = (50, 550)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The server under load. ``max_model_len`` is 0 where the server does not tell it."""

    url: str
    model: str
    max_model_len: int
    api_key: str = ""
    chat: bool = False
    timeout_s: float = 600.0

    @property
    def headers(self) -> dict[str, str]:
        """What every request carries."""
        return {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}


async def find_target(
    session: aiohttp.ClientSession,
    url: str,
    *,
    model: str,
    api_key: str,
    chat: bool,
    timeout_s: float,
) -> Target:
    """Ask the server for its models; the first one if ``model`` is empty."""
    target = Target(url=url.rstrip("/"), model=model, max_model_len=0, api_key=api_key)
    try:
        async with session.get(target.url + "/v1/models", headers=target.headers) as answer:
            body = await answer.read()
            if answer.status != 200:
                raise OServeError(
                    f"/v1/models answers with status {answer.status}",
                    place=url,
                    remedy="check the URL, and the API key if it wants one (--api-key)",
                )
            entries = msgspec.json.decode(body)["data"]
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise OServeError(
            f"no answer: {error or 'timed out'}", place=url, remedy="is the server running?"
        ) from None
    except (msgspec.DecodeError, KeyError, TypeError, ValueError):
        raise OServeError(
            "/v1/models is not in OpenAI's form", place=url, remedy="check the URL"
        ) from None
    names = [str(entry["id"]) for entry in entries]
    chosen = model or (names[0] if names else "")
    if chosen not in names:
        raise OServeError(
            f"the model {chosen!r} is not served", place="--model", remedy=f"there is {names}"
        )
    length = next(entry.get("max_model_len") for entry in entries if entry["id"] == chosen)
    return Target(
        url=target.url,
        model=chosen,
        max_model_len=int(length or 0),
        api_key=api_key,
        chat=chat,
        timeout_s=timeout_s,
    )


class PromptWriter:
    """Prompts of about so many tokens, each different, so that no prefix cache can help.

    ``tokens`` = ``base`` + ``per_word`` * words, as measured through ``/tokenize``.
    """

    def __init__(self, *, base: float, per_word: float, seed: int) -> None:
        self._base = base
        self._per_word = per_word
        self._draw = random.Random(seed)

    def write(self, tokens: int) -> str:
        """A prompt of about ``tokens`` tokens, rather a little fewer than more."""
        count = max(1, int((tokens - self._base) / self._per_word))
        return " ".join(self._draw.choices(_WORDS, k=count))


async def calibrated_writer(
    session: aiohttp.ClientSession, target: Target, *, seed: int
) -> PromptWriter:
    """Measure the tokenizer on two samples; one token a word where there is no ``/tokenize``."""
    draw = random.Random(seed)
    counts = []
    for words in _SAMPLE_WORDS:
        text = " ".join(draw.choices(_WORDS, k=words))
        body = {"model": target.model, "prompt": text}
        try:
            async with session.post(
                target.url + "/tokenize", json=body, headers=target.headers
            ) as answer:
                counts.append(int(msgspec.json.decode(await answer.read())["count"]))
        except (aiohttp.ClientError, TimeoutError, msgspec.DecodeError, KeyError, TypeError):
            return PromptWriter(base=0.0, per_word=1.3, seed=seed)
    few, many = _SAMPLE_WORDS
    per_word = max((counts[1] - counts[0]) / (many - few), 0.1)
    return PromptWriter(base=counts[0] - few * per_word, per_word=per_word, seed=seed)


class _Piece(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    finish_reason: str | None = None
    text: str | None = None
    delta: _Piece | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_events = msgspec.json.Decoder(_Event)


class _Stream:
    """What has been seen of one answer."""

    def __init__(self) -> None:
        self.first_s = 0.0
        self.last_s = 0.0
        self.gaps: list[float] = []
        self.usage: _Usage | None = None
        self.finish_reason = ""
        self.done = False
        self.error = ""
        self._rest = b""

    def feed(self, data: bytes, now_s: float) -> None:
        *events, self._rest = (self._rest + data).split(b"\n\n")
        for event in events:
            for line in event.split(b"\n"):
                if line.startswith(b"data:"):
                    self._take(line[5:].strip(), now_s)

    def _take(self, payload: bytes, now_s: float) -> None:
        if payload == b"[DONE]":
            self.done = True
            return
        try:
            event = _events.decode(payload)
        except msgspec.DecodeError as error:
            self.error = self.error or f"bad event: {error}"
            return
        if event.error is not None:
            self.error = self.error or f"error event: {str(event.error)[:160]}"
            return
        self.usage = event.usage or self.usage
        for choice in event.choices:
            piece = choice.text or (choice.delta.content if choice.delta else None)
            if piece or choice.finish_reason:
                self._token(now_s)
            self.finish_reason = choice.finish_reason or self.finish_reason

    def _token(self, now_s: float) -> None:
        if self.first_s == 0.0:
            self.first_s = now_s
        else:
            self.gaps.append(now_s - self.last_s)
        self.last_s = now_s

    def verdict(self, wanted: int) -> tuple[OutcomeStatus, str]:
        """Complete, truncated or failed, and why."""
        if self.error:
            return OutcomeStatus.FAILED, self.error
        if not self.done:
            return OutcomeStatus.TRUNCATED, "the stream ended without [DONE]"
        if not self.finish_reason:
            return OutcomeStatus.TRUNCATED, "no finish reason"
        if self.usage is None:
            return OutcomeStatus.TRUNCATED, "no usage report"
        if self.usage.completion_tokens != wanted:
            return OutcomeStatus.TRUNCATED, "fewer or more tokens than asked for"
        return OutcomeStatus.COMPLETED, ""


class Replay:
    """One run. ``outcomes`` grows as requests end; ``progress`` is called after each."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        target: Target,
        writer: PromptWriter,
        *,
        max_concurrency: int,
        progress: Callable[[], None],
    ) -> None:
        self.outcomes: list[Outcome] = []
        self.sent = 0
        self._session = session
        self._target = target
        self._writer = writer
        self._slots = asyncio.Semaphore(max_concurrency)
        self._progress = progress
        self._start_s = 0.0

    async def run(self, requests: Sequence[TraceRequest], *, speed: float) -> None:
        """Send each request when it is due, whether or not earlier ones have ended."""
        base_s = requests[0].arrival_s
        prompts = [self._writer.write(item.prompt_tokens) for item in requests]
        self._start_s = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for item, prompt in zip(requests, prompts, strict=True):
                due_s = (item.arrival_s - base_s) / speed
                wait_s = self._start_s + due_s - time.perf_counter()
                if wait_s > 0:
                    await asyncio.sleep(wait_s)
                group.create_task(self._one(item, prompt, due_s))

    async def _one(self, item: TraceRequest, prompt: str, due_s: float) -> None:
        async with self._slots:
            self.sent += 1
            sent_s = time.perf_counter() - self._start_s
            stream = _Stream()
            try:
                async with asyncio.timeout(self._target.timeout_s):
                    await self._talk(item, prompt, stream)
            except TimeoutError:
                stream.error = stream.error or "timed out"
            except (aiohttp.ClientError, OSError) as error:
                # A connection that breaks after the first token is a truncation, not a refusal.
                if stream.first_s == 0.0:
                    stream.error = stream.error or f"{type(error).__name__}: {error}"
        status, error_text = stream.verdict(item.output_tokens)
        now_s = time.perf_counter()
        begin_s = self._start_s + due_s
        usage = stream.usage or _Usage()
        self.outcomes.append(
            Outcome(
                due_s=due_s,
                sent_s=sent_s,
                ttft_s=(stream.first_s or now_s) - begin_s,
                e2e_s=(stream.last_s or now_s) - begin_s,
                itl_s=tuple(stream.gaps),
                prompt_tokens=usage.prompt_tokens or item.prompt_tokens,
                output_tokens=usage.completion_tokens,
                status=status,
                error=error_text,
            )
        )
        self._progress()

    async def _talk(self, item: TraceRequest, prompt: str, stream: _Stream) -> None:
        target = self._target
        body: dict[str, Any] = {
            "model": target.model,
            "max_tokens": item.output_tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if target.chat:
            body["messages"] = [{"role": "user", "content": prompt}]
        else:
            body["prompt"] = prompt
        path = "/v1/chat/completions" if target.chat else "/v1/completions"
        async with self._session.post(
            target.url + path, data=msgspec.json.encode(body), headers=self._headers()
        ) as answer:
            if answer.status != 200:
                text = (await answer.read())[:160].decode(errors="replace")
                stream.error = f"status {answer.status}: {text}"
                return
            async for data in answer.content.iter_any():
                stream.feed(data, time.perf_counter())

    def _headers(self) -> dict[str, str]:
        return {"content-type": "application/json", **self._target.headers}


def new_session() -> aiohttp.ClientSession:
    """A session without limits of its own."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
        read_bufsize=1 << 18,
    )
