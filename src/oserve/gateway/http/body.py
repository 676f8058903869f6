"""What the gateway must know of a request body, and the few fields it adds before passing it on.

A body is proved once, when it comes: UTF-8, one JSON object, the few fields that are read here of
the type they must be. From then on it is kept as the JSON of its fields. Rewriting puts those
together anew without reading what is in them, so nothing in a body can keep it from being written.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from oserve.gateway.http.errors import ApiError, bad_request
from oserve.wire.caches import FIELD

Fields = dict[str, msgspec.Raw]


@dataclass(slots=True, kw_only=True)
class GenerateBody:
    """A body: ``source`` as it came, its ``fields`` as JSON, and those that are read here.

    ``options`` are the fields of ``stream_options``. Lengths in tokens.
    """

    source: bytes = b""
    fields: Fields = field(default_factory=dict)
    options: Fields = field(default_factory=dict)
    model: str | None = None
    stream: bool = False
    wants_usage: bool = False
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    truncated_tokens: int | None = None
    ignore_eos: bool = False
    priority: int | None = None
    return_token_ids: bool = False
    echo: bool = False
    user: str | None = None
    session: str | None = None

    @property
    def output_limit(self) -> int | None:
        """Most tokens the client wants, if it said so; within what can be computed with."""
        limit = self.max_completion_tokens
        if limit is None:
            limit = self.max_tokens
        return None if limit is None else max(1, min(_MOST_TOKENS, limit))

    @property
    def may_tell_ids(self) -> bool:
        """Whether token ids may be asked for: a stream whose text they do not change."""
        return self.stream and not self.echo and bytes(self.fields.get("tools", b"")) in _NO_TOOLS


_BOM = b"\xef\xbb\xbf"
# Past this no engine goes, and floats count exactly.
_MOST_TOKENS = 1 << 31
_NO_TOOLS = {b"", b"null", b"[]"}
_HALF_PAIR = re.compile(
    rb"\\u[dD][89abAB]..(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB]..)\\u[dD][c-fC-F]"
)
_TRANSFERS = (FIELD, "ec_transfer_params")
_EXTRA = "vllm_xargs"
# As the engines read them: what a form or a shell script would write is taken.
_TRUE = {"1", "on", "t", "true", "y", "yes"}
_FALSE = {"0", "off", "f", "false", "n", "no"}
_INTEGER = re.compile(r"\s*([+-]?[0-9]+(?:_[0-9]+)*)(?:\.0*)?\s*")

_fields = msgspec.json.Decoder(Fields)


def parse_body(body: bytes) -> GenerateBody:
    """Read a body, or raise the ApiError that names what is wrong with it, and where."""
    body = body.removeprefix(_BOM)
    fields = _fields_of(body)
    _refuse_transfers(fields)
    options = _object(fields, "stream_options")
    return GenerateBody(
        source=body,
        fields=fields,
        options=options,
        model=_text(fields, "model"),
        stream=_flag(fields, "stream"),
        wants_usage=_flag(options, "include_usage", within="stream_options"),
        max_tokens=_integer(fields, "max_tokens"),
        max_completion_tokens=_integer(fields, "max_completion_tokens"),
        truncated_tokens=_truncated(fields),
        ignore_eos=_flag(fields, "ignore_eos"),
        priority=_integer(fields, "priority"),
        return_token_ids=_flag(fields, "return_token_ids"),
        echo=_flag(fields, "echo"),
        user=_text(fields, "user"),
        session=_text(fields, "session_id"),
    )


def _fields_of(body: bytes) -> Fields:
    try:
        if not body.isascii():
            body.decode()
        return _fields.decode(body)
    except UnicodeDecodeError as error:
        raise _not_json(f"byte {error.start} is not UTF-8") from None
    except msgspec.ValidationError as error:
        raise bad_request(f"The body must be a JSON object: {error}") from None
    except msgspec.DecodeError as error:
        half = _HALF_PAIR.search(body)
        if half is not None:
            raise _not_json(f"half of a surrogate pair (byte {half.start()})") from None
        raise _not_json(str(error)) from None
    except RecursionError:
        raise _not_json("it is nested too deeply") from None


def _not_json(reason: str) -> ApiError:
    return bad_request(f"The body is not valid JSON: {reason}", code="invalid_json")


def _value(fields: Fields, name: str, within: str = "") -> Any:
    raw = fields.get(name)
    if raw is None:
        return None
    try:
        return msgspec.json.decode(raw)
    except (msgspec.DecodeError, RecursionError) as error:
        raise _wrong(name, within, str(error).partition(" - at ")[0]) from None


def _wrong(name: str, within: str, reason: str) -> ApiError:
    param = f"{within}.{name}" if within else name
    return bad_request(f"`{param}`: {reason}", param=param)


def _text(fields: Fields, name: str) -> str | None:
    value = _value(fields, name)
    if value is None or isinstance(value, str):
        return value
    raise _wrong(name, "", "Expected a string")


def _flag(fields: Fields, name: str, *, within: str = "") -> bool:
    value = _value(fields, name, within)
    if value is None or isinstance(value, bool):
        return bool(value)
    try:
        return as_flag(value)
    except ValueError as error:
        raise _wrong(name, within, str(error)) from None


def _integer(fields: Fields, name: str) -> int | None:
    value = _value(fields, name)
    try:
        return None if value is None else as_integer(value)
    except ValueError as error:
        raise _wrong(name, "", str(error)) from None


def as_flag(value: object) -> bool:
    """A value as engines take it for a truth value; ValueError if they do not."""
    word = str(value).lower() if isinstance(value, str | int | float) else ""
    word = word.removesuffix(".0")
    if word in _TRUE or word in _FALSE:
        return word in _TRUE
    raise ValueError("Expected true or false")


def as_integer(value: object) -> int:
    """A value as engines take it for an integer; ValueError if they do not."""
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return int(value)
    found = _INTEGER.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        raise ValueError("Expected an integer")
    return int(found[1])


def _truncated(fields: Fields) -> int | None:
    """What a prompt is cut to; -1 is the context, which is no news."""
    limit = _integer(fields, "truncate_prompt_tokens")
    return limit if limit is not None and limit > 0 else None


def _object(fields: Fields, name: str) -> Fields:
    raw = fields.get(name)
    if raw is None or bytes(raw) == b"null":
        return {}
    try:
        return _fields.decode(raw)
    except (msgspec.DecodeError, RecursionError):
        raise _wrong(name, "", "Expected an object") from None


def _refuse_transfers(fields: Fields) -> None:
    """Caches that engines hand over are OServe's business; what asks for none passes.

    A client could else have an engine begin with what was computed for another prompt.
    """
    for name in _TRANSFERS:
        for key, raw in _object(fields, name).items():
            if bytes(raw) not in {b"null", b"false"}:
                reason = "engines hand over caches at OServe's word only; leave it out"
                raise _wrong(key[:64], name, reason)
    for key in _TRANSFERS:
        if _EXTRA in fields and key in _object(fields, _EXTRA):
            raise _wrong(key, _EXTRA, "this is no extra argument; leave it out")


def with_fields(
    parsed: GenerateBody,
    *,
    priority: int | None,
    model: str,
    token_ids: bool = False,
    cache: Mapping[str, str] | None = None,
) -> bytes:
    """The body to send to a replica: priority set, usage reported, model renamed if need be.

    ``token_ids``: have the ids of prompt and answer told. ``cache``: what an engine that moves KV
    caches is told of this request's (see ``wire.caches``).
    """
    given = parsed.fields
    added: dict[str, Any] = {}
    if model:
        added["model"] = model
    if priority is not None:
        added["priority"] = priority
    if parsed.stream and not parsed.wants_usage:
        added["stream_options"] = _with_usage(parsed.options)
    if token_ids and not parsed.return_token_ids:
        added["return_token_ids"] = True
    if cache:
        added[FIELD] = cache
    if "priority" in given and priority is None:
        given = {name: raw for name, raw in given.items() if name != "priority"}
    elif not added:
        return parsed.source
    return msgspec.json.encode({**given, **added})


def _with_usage(options: Fields) -> dict[str, Any]:
    """Usage at the end, for us; a client that did not ask for it gets none in between either."""
    off = {"continuous_usage_stats": False} if "continuous_usage_stats" in options else {}
    return {**options, "include_usage": True, **off}
