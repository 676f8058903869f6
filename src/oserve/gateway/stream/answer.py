"""The fields of an answer that the gateway needs: usage, errors, finish reasons; of any server.

Pure. A typed decoder reads each event; only the few special ones are parsed in full. JSON that is
no answer passes through unchanged.
"""

import json
import math
import re
from dataclasses import dataclass
from typing import Any

import msgspec

NOTHING = msgspec.Raw(b"")
_ABSENT = {b"", b"null"}
# In JSON a quote inside a string is escaped, so these match keys only, never generated text.
_PROMPT_TOKENS = re.compile(rb'"(?:prompt|input)_tokens"\s*:\s*(\d+)')
_OUTPUT_TOKENS = re.compile(rb'"(?:completion|output)_tokens"\s*:\s*(\d+)')
_CLIENT_TYPES = ("invalid", "badrequest", "validation", "unprocessable", "context_length")
_BUSY_TYPES = ("overloaded", "rate_limit", "ratelimit")
_STATUS_DIGITS = 3
_MAX_TOKENS = 1 << 40


class AnswerChoice(msgspec.Struct):
    """A choice of an answer; lists of token ids stay JSON."""

    finish_reason: str | None = None
    token_ids: msgspec.Raw = NOTHING
    prompt_token_ids: msgspec.Raw = NOTHING


class ReplicaAnswer(msgspec.Struct):
    """An event of a stream, or a whole answer.

    ``object`` is "error" in older errors of vLLM; ``error_type`` belongs to errors of TGI. ``type``
    names the events of OpenAI's Responses and Anthropic's Messages; ``response`` is the answer
    within an event of the former.
    """

    choices: list[AnswerChoice] | None = None
    usage: msgspec.Raw = NOTHING
    error: msgspec.Raw = NOTHING
    prompt_token_ids: msgspec.Raw = NOTHING
    object: str | None = None
    error_type: msgspec.Raw = NOTHING
    code: msgspec.Raw = NOTHING
    type: str | None = None
    response: msgspec.Raw = NOTHING

    @property
    def has_token(self) -> bool:
        """Whether a typed event brings text, about one token."""
        kind = self.type or ""
        return kind == "content_block_delta" or (
            kind.startswith("response.") and kind.endswith(".delta")
        )

    @property
    def is_last(self) -> bool:
        """Whether a typed event ends its answer."""
        return self.type in _LAST


_LAST = {"message_stop", "response.completed", "response.incomplete", "response.failed"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """An error within an answer. ``status``: the corresponding HTTP status.

    ``aborted``: the engine aborted the request, which is not the request's fault.
    """

    status: int
    message: str
    aborted: bool = False

    @property
    def of_client(self) -> bool:
        """Whether the request is invalid, so that a retry would fail, too."""
        return 400 <= self.status < 500 and self.status not in {408, 424, 429}


_decoder = msgspec.json.Decoder(ReplicaAnswer)
_any = msgspec.json.Decoder()


def read_answer(data: bytes) -> ReplicaAnswer | None:
    """Decode an answer; ``None`` if the JSON is none."""
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, RecursionError):
        return _lenient(data)


def _lenient(data: bytes) -> ReplicaAnswer | None:
    """Decode an answer with fields of unexpected types, or in invalid JSON that Python accepts."""
    fields = _decoded(data)
    if not isinstance(fields, dict):
        return None
    raw = {
        name: msgspec.Raw(_encoded(fields[name]))
        for name in ("usage", "error", "prompt_token_ids", "error_type", "code", "response")
        if name in fields
    }
    return ReplicaAnswer(
        choices=_choices(fields.get("choices")),
        object=_text(fields.get("object")),
        type=_text(fields.get("type")),
        **raw,
    )


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _choices(found: Any) -> list[AnswerChoice] | None:
    if not isinstance(found, list):
        return None
    choices = []
    for item in found:
        fields = item if isinstance(item, dict) else {}
        reason = fields.get("finish_reason")
        ids = {
            name: msgspec.Raw(_encoded(fields[name]))
            for name in ("token_ids", "prompt_token_ids")
            if name in fields
        }
        choices.append(
            AnswerChoice(finish_reason=reason if isinstance(reason, str) else None, **ids)
        )
    return choices


def _decoded(data: bytes | msgspec.Raw) -> Any:
    """Decode with Python's json module, which accepts NaN and lone surrogates."""
    try:
        return _any.decode(data)
    except (msgspec.DecodeError, RecursionError):
        pass
    try:
        return json.loads(bytes(data))
    except (ValueError, RecursionError):
        return None


def _encoded(value: Any) -> bytes:
    if isinstance(value, float) and not math.isfinite(value):
        # msgspec writes null for it, which would be no value at all.
        return json.dumps(value).encode()
    try:
        return msgspec.json.encode(value)
    except (OverflowError, ValueError):
        # msgspec does not encode such large numbers.
        return json.dumps(value).encode()


def has_usage(answer: ReplicaAnswer) -> bool:
    """Whether the answer reports token counts."""
    return bytes(answer.usage) not in _ABSENT


def has_ids(answer: ReplicaAnswer) -> bool:
    """Whether the answer has token ids, of prompt or output."""
    if bytes(answer.prompt_token_ids) not in _ABSENT:
        return True
    return any(
        bytes(choice.token_ids) not in _ABSENT or bytes(choice.prompt_token_ids) not in _ABSENT
        for choice in answer.choices or ()
    )


def trouble_of(answer: ReplicaAnswer) -> Trouble | None:
    """The error in the answer, if any."""
    if bytes(answer.error) not in _ABSENT:
        error = _decoded(answer.error)
        fields = error if isinstance(error, dict) else {"message": str(error)}
        if answer.error_type:
            fields = {"type": _decoded(answer.error_type), **fields}
        return _trouble(fields)
    if answer.object == "error":
        return _trouble({"code": _decoded(answer.code)})
    if any(choice.finish_reason == "abort" for choice in answer.choices or ()):
        return Trouble(status=503, message="the engine aborted the request", aborted=True)
    return None


def _trouble(fields: dict[str, Any]) -> Trouble:
    """Parse an error of vLLM (a numeric code), OpenAI (a type) or TGI (a message and a type)."""
    code = fields.get("code", fields.get("http_status_code"))
    if isinstance(code, str) and code.isdecimal() and len(code) == _STATUS_DIGITS:
        code = int(code)
    status = 500
    if isinstance(code, int) and 400 <= code < 600:
        status = code
    else:
        kinds = f"{fields.get('type')} {code}".lower().replace(" ", "")
        if any(name in kinds for name in _CLIENT_TYPES):
            status = 400
        elif any(name in kinds for name in _BUSY_TYPES):
            status = 429
    return Trouble(status=status, message=str(fields.get("message", ""))[:200])


def with_service_tier(data: bytes, word: str) -> bytes:
    """The JSON of an answer with OpenAI's ``service_tier``; unchanged if it is no object."""
    fields = _decoded(data)
    return _encoded({**fields, "service_tier": word}) if isinstance(fields, dict) else data


def events_with_service_tier(events: bytes, word: str) -> bytes:
    """The same for whole events, as the gateway writes them; unchanged without a word."""
    if not word:
        return events
    return b"\n\n".join(
        b"data: " + with_service_tier(event[6:], word) if event.startswith(b"data: {") else event
        for event in events.split(b"\n\n")
    )


def shown(data: bytes, answer: ReplicaAnswer, *, hide_usage: bool, hide_ids: bool) -> bytes | None:
    """The event's data for the client; ``None``: the event is dropped.

    OServe's own usage request causes the events that report usage and have no choices.
    """
    usage = hide_usage and has_usage(answer)
    if usage and not answer.choices:
        return None
    ids = hide_ids and has_ids(answer)
    if not usage and not ids:
        return data
    fields = _decoded(data)
    if not isinstance(fields, dict):
        return data
    if usage:
        del fields["usage"]
    if ids:
        choices = fields.get("choices")
        for item in (fields, *(choices if isinstance(choices, list) else ())):
            for name in ("token_ids", "prompt_token_ids"):
                if isinstance(item, dict) and item.get(name) is not None:
                    item[name] = None
    return _encoded(fields)


class TokenUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Token counts as a server reported them; ``None``: not reported."""

    prompt_tokens: int | None = None
    output_tokens: int | None = None


def usage_of(raw: bytes | msgspec.Raw) -> TokenUsage:
    """Parse the value of a usage field."""
    fields = _decoded(raw)
    if not isinstance(fields, dict):
        return TokenUsage()
    return TokenUsage(
        prompt_tokens=_count(fields.get("prompt_tokens", fields.get("input_tokens"))),
        output_tokens=_count(fields.get("completion_tokens", fields.get("output_tokens"))),
    )


def usage_within(answer: ReplicaAnswer) -> bytes:
    """The usage report of an event, or of the answer within it; empty if there is none."""
    if has_usage(answer):
        return bytes(answer.usage)
    if not answer.is_last or not answer.response:
        return b""
    within = read_answer(bytes(answer.response))
    return bytes(within.usage) if within is not None and has_usage(within) else b""


def usage_in(tail: bytes) -> TokenUsage:
    """Find the usage in the last bytes of an answer that is too long to parse."""
    prompt, output = _PROMPT_TOKENS.findall(tail), _OUTPUT_TOKENS.findall(tail)
    return TokenUsage(
        prompt_tokens=_count(int(prompt[-1][:15])) if prompt else None,
        output_tokens=_count(int(output[-1][:15])) if output else None,
    )


def _count(value: Any) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return int(value) if 0 <= value < _MAX_TOKENS else None
