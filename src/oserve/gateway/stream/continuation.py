"""Continuations: the state from which another replica resumes a running stream.

Pure: events in; the body of a continuation and the client's further events out. A stream resumes
as a text completion of token ids: those of the prompt and of the output so far. The last few are
left out where the engine held text back (stop strings) or stood within a character. The new replica
generates these again, and the gateway drops the text that the client already has. If that text
differs, the stream has *diverged* and ends. ``T`` at a time is the length of all text generated so
far, in characters, both sent and held back.
"""

from typing import Any, NamedTuple

import msgspec

from oserve.gateway.http.body import Fields
from oserve.gateway.stream.continuation_fields import (
    UnmovableError,
    completion_fields,
    migration_obstacle,
    values_of,
)

EventObject = dict[str, Any]

DONE = b"data: [DONE]\n\n"
# No token has so many characters; vLLM repeats the text of a prompt that ends within a character.
_TOKEN_CHARS = 512
_NO_IDS = "the replica does not report token ids"
# Exceptions raised by events whose fields have other types than vLLM's.
_FOREIGN = (AttributeError, IndexError, KeyError, TypeError, ValueError)
_FORM = "its events have an unknown form"


class DivergedError(UnmovableError):
    """The regenerated text or tokens differ from those that the client has."""


class BrokenError(Exception):
    """The engine aborted the answer with an event."""


class StreamMark(NamedTuple):
    """A point at which text grew: tokens, ``T``, and whether the last character was complete."""

    tokens: int
    text: int
    clean: bool


class Continuation:
    """One stream: follows the events of the replica that serves it at present.

    ``fields``: of the client's body. ``prompt`` and ``tokens`` are ids; ``shown`` is the text that
    the client has. ``finished``: it has the last token; ``done``: it has ``[DONE]``. Raises
    UnmovableError if the state of the request cannot be transferred.
    """

    def __init__(self, fields: Fields, *, chat: bool) -> None:
        body = values_of(fields, chat=chat)
        reason = migration_obstacle(body, chat=chat)
        if reason:
            raise UnmovableError(reason)
        self._body = body
        self._chat = chat
        options = body.get("stream_options") or {}
        self._wants_usage = bool(options.get("include_usage"))
        self._wants_running_usage = self._wants_usage and bool(
            options.get("continuous_usage_stats")
        )
        self._wants_ids = bool(body.get("return_token_ids"))
        self._sees_tokens = self._wants_ids or not (
            body.get("logprobs") is None or body["logprobs"] is False
        )
        self._sampled = body.get("temperature") != 0
        stop = body.get("stop") or []
        longest = max(
            (len(item) for item in ([stop] if isinstance(stop, str) else stop)), default=0
        )
        included = bool(body.get("include_stop_str_in_output"))
        self._held = 0 if included else max(0, longest - 1)
        self._lookback = max(0, longest - 1) if included else 0
        self._head: EventObject = {}
        self.prompt: list[int] = []
        self.tokens: list[int] = []
        self.shown = ""
        self.finished = False
        self.done = False
        self._usage_sent = False
        self._shown_ids: list[int] = []
        self._position = 0
        self._marks: list[StreamMark] = []
        self._offsets: list[int] = []
        self._next_offset = 0

    # -- following ------------------------------------------------------------------------------
    def follow(self, event: EventObject) -> None:
        """Add an event of the stream's first replica, which the client received unchanged."""
        try:
            self._follow(event)
        except _FOREIGN:
            raise UnmovableError(_FORM) from None

    def _follow(self, event: EventObject) -> None:
        choice = _choice_of(event)
        if not self._head and "id" in event:
            self._head = {key: event.get(key) for key in ("id", "object", "created", "model")}
        if choice is None:
            self._usage_sent = self._usage_sent or bool(event.get("usage"))
            return
        prompt = event.get("prompt_token_ids") or choice.get("prompt_token_ids")
        if prompt:
            self.prompt = prompt
        if not self.prompt:
            raise UnmovableError(_NO_IDS)
        text = _delta_text(choice) if self._chat else choice["text"]
        ids = choice.get("token_ids") or []
        if not ids and text:
            raise UnmovableError(_NO_IDS)
        if text is None and ids:
            raise UnmovableError("a parser transforms its text")
        self._take(choice, ids, text or "")

    def _take(self, choice: EventObject, ids: list[int], text: str) -> tuple[str, int]:
        """Add tokens and text; returns what the client lacks: text, number of tokens."""
        overlap = self.shown[self._position : self._position + len(text)]
        if text[: len(overlap)] != overlap or len(text) > _TOKEN_CHARS * (
            len(ids) + self._held + 1
        ):
            raise DivergedError("the text differs from what was sent")
        fresh = max(0, min(len(ids), len(self.tokens) + len(ids) - len(self._shown_ids)))
        again = ids[: len(ids) - fresh]
        before = self._shown_ids[len(self.tokens) : len(self.tokens) + len(again)]
        if self._sees_tokens and again != before:
            raise DivergedError("the tokens differ from those that were sent")
        self.tokens += ids
        self._shown_ids += ids[len(ids) - fresh :]
        new = text[len(overlap) :]
        self.shown += new
        self._position += len(text)
        if text:
            clean = len(ids) == 1 or (self._sampled and self.shown.isascii())
            self._marks.append(StreamMark(len(self.tokens), self._position + self._held, clean))
        self.finished = choice.get("finish_reason") is not None
        self._note_offsets(choice.get("logprobs"), fresh)
        return new, fresh

    def _note_offsets(self, logprobs: EventObject | None, fresh: int) -> None:
        offsets = (logprobs or {}).get("text_offset")
        if offsets and fresh and logprobs is not None:
            self._offsets += offsets[len(offsets) - fresh :]
            self._next_offset = offsets[-1] + len(logprobs["tokens"][-1])

    # -- continuing -----------------------------------------------------------------------------
    def rewind(self) -> None:
        """Go back to the last point from which another replica can generate the rest."""
        limit = self._position - self._lookback
        marks = [mark for mark in self._marks if mark.clean and mark.text <= limit]
        mark = marks[-1] if marks else StreamMark(0, 0, True)
        self._marks = marks
        del self.tokens[mark.tokens :]
        self._position = mark.text

    def continuation(self) -> bytes:
        """The body of the request for the rest; call ``rewind`` before."""
        body = completion_fields(
            self._body, chat=self._chat, made=len(self.tokens), sampled=self._sampled
        )
        body["prompt"] = [*self.prompt, *self.tokens]
        body["stream"] = True
        body["stream_options"] = {"include_usage": True}
        body["return_token_ids"] = True
        return msgspec.json.encode(body)

    @property
    def context_tokens(self) -> int:
        """Tokens of the prompt and the output so far."""
        return len(self.prompt) + len(self.tokens)

    def convert(self, event: EventObject) -> bytes:
        """Convert an event of a continuation to the client's, as payload; empty: nothing new.

        Raises BrokenError if the engine aborts, DivergedError if the regenerated part differs.
        """
        try:
            return self._convert(event)
        except _FOREIGN:
            raise UnmovableError(_FORM) from None

    def _convert(self, event: EventObject) -> bytes:
        choice = _choice_of(event)
        if choice is None:
            return b""
        ids = choice.get("token_ids") or []
        if choice["text"] and not ids:
            raise UnmovableError(_NO_IDS)
        base = self._offsets[len(self.tokens)] if len(self.tokens) < len(self._offsets) else None
        logprobs = choice.get("logprobs")
        if logprobs and not self._chat:
            shift = (self._next_offset if base is None else base) - logprobs["text_offset"][0]
            logprobs["text_offset"] = [offset + shift for offset in logprobs["text_offset"]]
        text, fresh = self._take(choice, ids, choice["text"])
        if not text and not fresh and not self.finished:
            return b""
        shown: EventObject = (
            {"index": 0, "delta": {"content": text}} if self._chat else dict(choice)
        )
        if self._chat:
            shown["finish_reason"] = choice["finish_reason"]
            if self.finished:
                shown["stop_reason"] = choice.get("stop_reason")
        else:
            shown["text"] = text
            shown["prompt_token_ids"] = None
        shown["logprobs"] = self._newest(logprobs, fresh)
        shown["token_ids"] = ids[len(ids) - fresh :] if self._wants_ids else None
        more = {"usage": self._usage()} if self._wants_running_usage else {}
        return self._payload([shown], **more)

    def _newest(self, logprobs: EventObject | None, fresh: int) -> EventObject | None:
        if not logprobs:
            return None
        first = len(logprobs["tokens"]) - fresh
        newest = {key: values[first:] if values else values for key, values in logprobs.items()}
        if not self._chat:
            return newest
        most = self._body.get("top_logprobs") or 0
        entries = zip(
            newest["tokens"], newest["token_logprobs"], newest["top_logprobs"], strict=True
        )
        return {
            "content": [
                {**_logprob(token, value), "top_logprobs": _top(top, most)}
                for token, value, top in entries
            ]
        }

    def _usage(self) -> EventObject:
        made = len(self.tokens)
        return {
            "prompt_tokens": len(self.prompt),
            "total_tokens": len(self.prompt) + made,
            "completion_tokens": made,
        }

    def usage(self) -> bytes:
        """The usage event of the whole answer, as payload."""
        return self._payload([], usage=self._usage())

    def ending(self) -> bytes:
        """The events after the last token, as payload."""
        if self.done:
            return b""
        return (self.usage() if self._wants_usage and not self._usage_sent else b"") + DONE

    def _payload(self, choices: list[EventObject], **more: Any) -> bytes:
        event = {**self._head, "choices": choices, **more}
        return b"data: " + msgspec.json.encode(event) + b"\n\n"


def _choice_of(event: EventObject) -> EventObject | None:
    if event.get("error") is not None:
        raise BrokenError("the replica sent an error")
    choices: list[EventObject] = event.get("choices") or []
    if not choices:
        return None
    choice = choices[0]
    if len(choices) > 1 or choice.get("index", 0) != 0:
        raise UnmovableError("it has several answers")
    if choice.get("finish_reason") == "abort":
        raise BrokenError("the replica aborted the request")
    return choice


def _delta_text(choice: EventObject) -> str | None:
    delta: EventObject = choice.get("delta") or {}
    for key, value in delta.items():
        if value and key not in {"role", "content"}:
            raise UnmovableError(f"its answer has {key}")
    text: str | None = delta.get("content")
    return text


def _logprob(token: str, value: float) -> EventObject:
    return {"token": token, "logprob": value, "bytes": list(token.encode(errors="replace"))}


def _top(top: EventObject | None, most: int) -> list[EventObject]:
    return [_logprob(token, value) for token, value in list((top or {}).items())[:most]]
