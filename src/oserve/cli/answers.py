"""One streamed answer as a client sees it: the times of its tokens, and whether it is complete.

Pure: bytes and times in, a status out. Any delta with output counts as tokens: text, reasoning
(``reasoning`` of vLLM, ``reasoning_content`` of SGLang and DeepSeek), tool calls, refusals, audio.
An ``ApiDialect`` describes what other servers leave out of a stream.
"""

from dataclasses import dataclass
from typing import Any

import msgspec

from oserve.traces import FailureKind, OutcomeStatus
from oserve.wire.events import EventReader, ServerSentEvent

_REASONING = ("reasoning", "reasoning_content")
_ANSWER = ("content", "tool_calls", "function_call", "refusal", "audio")
# Finish reasons of requests that the engine aborted.
_ABORTED = {"abort", "error"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiDialect:
    """The observed behaviour of a server, which its answers are checked against.

    ``done``: streams end with ``[DONE]``. ``usage``: streams report their token counts.
    ``stream_options``, ``ignore_eos``: it accepts these fields. ``exact``: it generates as many
    tokens as requested, so a shorter answer is truncated.
    """

    done: bool = True
    usage: bool = True
    stream_options: bool = True
    ignore_eos: bool = True
    exact: bool = True

    @property
    def notes(self) -> tuple[str, ...]:
        """The checks and measurements that differ from the usual, for people."""
        told = (
            (self.done, "it sends no [DONE]: a finish reason counts as the end of a stream"),
            (self.usage, "it reports no usage: each event counts as one token"),
            (self.exact, "it may stop early: the lengths of its answers are not checked"),
        )
        return tuple(note for usual, note in told if not usual)


USUAL = ApiDialect()
"""The dialect of vLLM and OServe."""


class ReportedUsage(msgspec.Struct):
    """The token counts of a response."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    completion_tokens_details: dict[str, Any] | None = None

    @property
    def reasoning_tokens(self) -> int:
        """The reasoning tokens of the completion; 0 if not reported."""
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
    """The state of one stream. Times are those passed to ``feed``; 0 means not yet."""

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
        self._events = EventReader()

    @property
    def output_tokens(self) -> int:
        """The token count that the server reported, else the number of events with output."""
        counted = self.usage.completion_tokens if self.usage else None
        return (len(self.gaps) + (self.first_s > 0.0)) if counted is None else counted

    def feed(self, data: bytes, now_s: float) -> None:
        """Read received bytes. Raises EventsError."""
        for event in self._events.feed(data):
            self._take(event, now_s)

    def end(self, now_s: float) -> None:
        """Mark the end of a complete response; a last event without its empty line counts."""
        last = self._events.end()
        if last is not None:
            self._take(last, now_s)

    def fail(self, kind: FailureKind, error: str) -> None:
        """Record a failure; the first one stays."""
        if self.failure is None:
            self.failure, self.error = kind, error

    def _take(self, received: ServerSentEvent, now_s: float) -> None:
        payload = received.data
        if payload is None:
            return
        if payload.strip() == b"[DONE]":
            self.done = True
            return
        if received.kind == b"error":
            self.fail(FailureKind.ERROR_EVENT, f"error event: {error_message(payload)}")
            return
        try:
            event = _decoder.decode(payload)
        except (msgspec.DecodeError, RecursionError) as error:
            self.fail(FailureKind.BAD_EVENT, f"bad event: {error}")
            return
        if event.error is not None or event.object == "error":
            self.fail(FailureKind.ERROR_EVENT, f"error event: {error_message(payload)}")
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
        """Completed, truncated or failed, and the reason."""
        # A connection that breaks after the first token is a truncation, not a refusal.
        broke = self.failure is FailureKind.CONNECTION and self.first_s > 0.0
        if self.failure is not None and not broke:
            return OutcomeStatus.FAILED, self.error
        lacks = (
            (broke and not self.done, self.error),
            (dialect.done and not self.done, "the stream ended without [DONE]"),
            (not self.finish_reason, "no finish reason"),
            (self.finish_reason in _ABORTED, f"the engine aborted it ({self.finish_reason})"),
            (dialect.usage and self.usage is None, "no usage report"),
            (self._short(wanted, dialect), "fewer or more tokens than requested"),
        )
        reason = next((words for lacking, words in lacks if lacking), "")
        return (OutcomeStatus.TRUNCATED if reason else OutcomeStatus.COMPLETED), reason

    def _short(self, wanted: int, dialect: ApiDialect) -> bool:
        counted = self.usage.completion_tokens if self.usage else None
        if counted is None or counted == wanted:
            return False
        return dialect.exact or self.finish_reason == "length"


def error_message(body: bytes) -> str:
    """The message of an error body of OpenAI, FastAPI and others; else the text itself."""
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
