"""What the gateway must know of a request body, and the few fields it adds before passing it on."""

import re
from typing import Any

import msgspec

from oserve.gateway.errors import bad_request
from oserve.wire.caches import FIELD


class GenerateBody(msgspec.Struct):
    """The fields the gateway reads; every other passes through unseen. Lengths in tokens."""

    model: str | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    messages: msgspec.Raw = msgspec.Raw(b"")
    prompt: msgspec.Raw = msgspec.Raw(b"")
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    ignore_eos: bool | None = None
    priority: int | None = None
    return_token_ids: bool | None = None
    echo: bool | None = None
    tools: msgspec.Raw = msgspec.Raw(b"")
    user: str | None = None
    kv_transfer_params: msgspec.Raw = msgspec.Raw(b"")

    @property
    def output_limit(self) -> int | None:
        """Most tokens the client wants, if it said so."""
        limit = self.max_completion_tokens
        return limit if limit is not None else self.max_tokens

    @property
    def may_tell_ids(self) -> bool:
        """Whether token ids may be asked for: a stream whose text they do not change."""
        return bool(self.stream) and not self.echo and bytes(self.tools) in _NO_TOOLS

    @property
    def wants_usage(self) -> bool:
        """Whether the client itself asked for the usage chunk at the end of a stream."""
        return bool((self.stream_options or {}).get("include_usage"))


_SYSTEM = re.compile(rb'\[\s*\{\s*"role"\s*:\s*"(?:system|developer)"\s*,\s*"content"\s*:\s*"')
_NO_TOOLS = {b"", b"null", b"[]"}
_HEAD_BYTES = 256
_PREFIX_BYTES = 2048
_BACKSLASH = ord("\\")

# Lenient where the engines are: 1 for true, "5" for 5.
_decoder = msgspec.json.Decoder(GenerateBody, strict=False)


def parse_body(body: bytes) -> GenerateBody:
    """Read a body, or raise the ApiError that names what is wrong with it."""
    try:
        return _decoder.decode(body)
    except msgspec.ValidationError as error:
        text, _, path = str(error).partition(" - at `$")
        param = path.strip("`.") or None
        raise bad_request(text, param=param) from None
    except msgspec.DecodeError as error:
        raise bad_request(f"The body is not valid JSON: {error}", code="invalid_json") from None
    except RecursionError:
        raise bad_request("The body is nested too deeply", code="invalid_json") from None


def prompt_size(parsed: GenerateBody) -> tuple[int, bool]:
    """Size of the prompt and whether it is an exact token count (else bytes of JSON text)."""
    raw = bytes(parsed.prompt or parsed.messages)
    inner = raw.lstrip(b"[ \t\r\n")
    if raw.startswith(b"[") and inner[:1].isdigit():
        return raw.count(b",") + 1, True
    return len(raw), False


def system_prefix(parsed: GenerateBody) -> bytes:
    """The beginning of the system prompt as it stands in the JSON, at most 2 KiB; empty: none.

    Requests that share it share what engines have cached of it, and often how long answers are.
    """
    raw = memoryview(parsed.messages)
    found = _SYSTEM.match(raw[:_HEAD_BYTES])
    if found is None:
        return b""
    start = found.end()
    text = bytes(raw[start : start + _PREFIX_BYTES])
    end = text.find(b'"')
    while end > 0 and text[end - 1] == _BACKSLASH:
        end = text.find(b'"', end + 1)
    return text if end < 0 else text[:end]


def with_fields(
    body: bytes,
    parsed: GenerateBody,
    *,
    priority: int | None,
    model: str,
    token_ids: bool = False,
    cache: dict[str, str] | None = None,
) -> bytes:
    """The body to send to a replica: priority set, usage reported, model renamed if need be.

    ``token_ids``: have the ids of prompt and answer told. ``cache``: what an engine that moves KV
    caches is told of this request's (see ``wire.caches``); ``None`` for other engines.

    Fields are spliced in before the closing brace where the client did not send them; only a body
    that holds them already is written anew.
    """
    usage = bool(parsed.stream) and not parsed.wants_usage
    ids = token_ids and not parsed.return_token_ids
    known = parsed.priority is not None or (ids and parsed.return_token_ids is not None)
    # Caches of others are nobody's to ask for.
    known = known or (cache is not None and bool(parsed.kv_transfer_params))
    if model or known or (usage and parsed.stream_options is not None):
        fields = msgspec.json.decode(body)
        if model:
            fields["model"] = model
        fields.pop("priority", None)
        if priority is not None:
            fields["priority"] = priority
        if usage:
            fields["stream_options"] = {**(parsed.stream_options or {}), "include_usage": True}
        if ids:
            fields["return_token_ids"] = True
        if cache is not None:
            fields.pop(FIELD, None)
        if cache:
            fields[FIELD] = cache
        return msgspec.json.encode(fields)
    extra = b""
    if priority is not None:
        extra += b',"priority":%d' % priority
    if usage:
        extra += b',"stream_options":{"include_usage":true}'
    if ids:
        extra += b',"return_token_ids":true'
    if cache:
        extra += b',"%b":%b' % (FIELD.encode(), msgspec.json.encode(cache))
    if not extra:
        return body
    head = body.rstrip()[:-1].rstrip()
    return head + (extra[1:] if head.endswith(b"{") else extra) + b"}"
