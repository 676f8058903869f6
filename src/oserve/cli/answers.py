"""One streamed answer as a client sees it: when its tokens came, and whether it is whole.

Pure: bytes and times in, a verdict out. Any delta that carries output counts as tokens: text,
reasoning (``reasoning`` of vLLM, ``reasoning_content`` of SGLang and DeepSeek), tool calls,
refusals, audio. What servers of other makes leave out of a stream is told by a ``ApiDialect``.
"""

from dataclasses import dataclass
from typing import Any

import msgspec

from oserve.traces import FailureKind, OutcomeStatus

_REASONING = ("reasoning", "reasoning_content")
_ANSWER = ("content", "tool_calls", "function_call", "refusal", "audio")
# Finish reasons by which engines say that they gave a request up.
_GIVEN_UP = {"abort", "error"}
_MAX_EVENT_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiDialect:
    """What a server was seen to do, and is held to.

    ``done``: ``[DONE]`` ends a stream. ``usage``: a stream ends with its token counts.
    ``stream_options``, ``ignore_eos``: it takes these fields. ``exact``: it makes as many tokens
    as are asked for, so that an answer that stops earlier is cut off.
    """

    done: bool = True
    usage: bool = True
    stream_options: bool = True
    ignore_eos: bool = True
    exact: bool = True

    @property
    def notes(self) -> tuple[str, ...]:
        """What was not checked or measured as usual, for people."""
        told = (
            (self.done, "it sends no [DONE]: streams are held whole by their finish reason"),
            (self.usage, "it reports no usage: tokens are counted by events"),
            (self.exact, "it may stop early: lengths of answers are not held against it"),
        )
        return tuple(note for usual, note in told if not usual)


USUAL = ApiDialect()
"""vLLM's, and OServe's."""


class ReportedUsage(msgspec.Struct):
    """The token counts of a response."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    completion_tokens_details: dict[str, Any] | None = None

    @property
    def reasoning_tokens(self) -> int:
        """Of the completion's, where the server tells."""
        count = (self.completion_tokens_details or {}).get("reasoning_tokens")
        return count if isinstance(count, int) else 0


class _Choice(msgspec.Struct):
    finish_reason: str | None = None
    text: Any = None
    delta: dict[str, Any] | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: ReportedUsage | None = None
    error: Any = None
    object: Any = None
    message: Any = None


_decoder = msgspec.json.Decoder(_Event)


class BenchAnswer:
    """What has been seen of one stream. Times are those given to ``feed``; 0 is not yet."""

    def __init__(self) -> None:
        self.first_s = 0.0
        self.first_answer_s = 0.0
        self.last_s = 0.0
        self.gaps: list[float] = []
        self.usage: ReportedUsage | None = None
        self.finish_reason = ""
        self.done = False
        self.reasoned = False
        self.error = ""
        self.failure: FailureKind | None = None
        self._events = _Events()

    @property
    def output_tokens(self) -> int:
        """As the server counted them, else the events that carried any."""
        counted = self.usage.completion_tokens if self.usage else None
        return (len(self.gaps) + (self.first_s > 0.0)) if counted is None else counted

    def feed(self, data: bytes, now_s: float) -> None:
        """Take in what came."""
        for kind, payload in self._events.feed(data):
            self._take(kind, payload, now_s)

    def end(self, now_s: float) -> None:
        """The response ended well; an event that lacks its empty line still counts."""
        for kind, payload in self._events.feed(b"\n\n"):
            self._take(kind, payload, now_s)

    def fail(self, kind: FailureKind, error: str) -> None:
        """The first failure stays."""
        if self.failure is None:
            self.failure, self.error = kind, error

    def _take(self, kind: bytes, payload: bytes, now_s: float) -> None:
        if payload.strip() == b"[DONE]":
            self.done = True
            return
        if kind == b"error":
            self.fail(FailureKind.ERROR_EVENT, f"error event: {said(payload)}")
            return
        try:
            event = _decoder.decode(payload)
        except (msgspec.DecodeError, RecursionError) as error:
            self.fail(FailureKind.BAD_EVENT, f"bad event: {error}")
            return
        if event.error is not None or event.object == "error":
            self.fail(FailureKind.ERROR_EVENT, f"error event: {said(payload)}")
            return
        self.usage = event.usage or self.usage
        for choice in event.choices or ():
            delta = choice.delta or {}
            thought = any(delta.get(name) for name in _REASONING)
            answered = bool(choice.text) or any(delta.get(name) for name in _ANSWER)
            self.reasoned = self.reasoned or thought
            if thought or answered or choice.finish_reason:
                self._token(now_s, answered=answered)
            self.finish_reason = choice.finish_reason or self.finish_reason

    def _token(self, now_s: float, *, answered: bool) -> None:
        if self.first_s == 0.0:
            self.first_s = now_s
        else:
            self.gaps.append(now_s - self.last_s)
        if answered and self.first_answer_s == 0.0:
            self.first_answer_s = now_s
        self.last_s = now_s

    def verdict(self, wanted: int, dialect: ApiDialect) -> tuple[OutcomeStatus, str]:
        """Complete, truncated or failed, and why."""
        # A connection that breaks after the first token is a truncation, not a refusal.
        broke = self.failure is FailureKind.CONNECTION and self.first_s > 0.0
        if self.failure is not None and not broke:
            return OutcomeStatus.FAILED, self.error
        lacks = (
            (broke and not self.done, self.error),
            (dialect.done and not self.done, "the stream ended without [DONE]"),
            (not self.finish_reason, "no finish reason"),
            (self.finish_reason in _GIVEN_UP, f"the engine gave it up ({self.finish_reason})"),
            (dialect.usage and self.usage is None, "no usage report"),
            (self._short(wanted, dialect), "fewer or more tokens than asked for"),
        )
        reason = next((words for lacking, words in lacks if lacking), "")
        return (OutcomeStatus.TRUNCATED if reason else OutcomeStatus.COMPLETED), reason

    def _short(self, wanted: int, dialect: ApiDialect) -> bool:
        counted = self.usage.completion_tokens if self.usage else None
        if counted is None or counted == wanted:
            return False
        return dialect.exact or self.finish_reason == "length"


def said(body: bytes) -> str:
    """The message of an error, in the forms of OpenAI, FastAPI and others; else the text itself."""
    text = body.decode(errors="replace").strip()
    try:
        found = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError):
        return text[:200]
    for name in ("error", "message", "detail", "msg"):
        if isinstance(found, list) and found:
            found = found[0]
        if isinstance(found, dict) and found.get(name):
            found = found[name]
    return (found if isinstance(found, str) else text)[:200]


class _Events:
    """Server-sent events: name and data of each, whatever ends the lines."""

    def __init__(self) -> None:
        self._rest = b""
        self._after_cr = False

    def feed(self, data: bytes) -> list[tuple[bytes, bytes]]:
        if self._after_cr:
            data = data.removeprefix(b"\n")
        self._after_cr = data.endswith(b"\r")
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *blocks, self._rest = (self._rest + data).split(b"\n\n")
        if len(self._rest) > _MAX_EVENT_BYTES:
            raise ValueError("an event is longer than 64 MiB")
        found = []
        for block in blocks:
            kind, lines = b"", []
            for line in block.split(b"\n"):
                name, _, value = line.removeprefix(b"\xef\xbb\xbf").partition(b":")
                if name == b"data":
                    lines.append(value.removeprefix(b" "))
                elif name == b"event":
                    kind = value.strip()
            if lines:
                found.append((kind, b"\n".join(lines)))
        return found
