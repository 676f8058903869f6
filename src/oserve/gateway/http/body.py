"""Request bodies: the fields that the gateway reads, and those that it adds for a replica.

The gateway validates a body once, on arrival: UTF-8, one JSON object, and every field that it reads
of a type that engines accept. Rewriting copies the JSON of the other fields unchanged, so it cannot
fail.
"""

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from oserve.gateway.http.api_form import CHAT, ApiForm
from oserve.gateway.http.errors import ApiError, bad_request
from oserve.wire.caches import FIELD

Fields = dict[str, msgspec.Raw]
ABSENT = msgspec.Raw(b"")


SALT_FIELD = "cache_salt"
"""vLLM shares cached prefixes only between requests with the same salt."""


class BodyFields(msgspec.Struct, kw_only=True):
    """The fields of a body that the gateway reads; lengths in tokens. ``ABSENT``: not given.

    Fields whose content the gateway seldom or never reads stay JSON.
    """

    model: str | None = None
    stream: bool | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_output_tokens: int | None = None
    truncate_prompt_tokens: int | None = None
    ignore_eos: bool | None = None
    priority: int | msgspec.UnsetType | None = msgspec.UNSET
    return_token_ids: bool | msgspec.UnsetType | None = msgspec.UNSET
    echo: bool | None = None
    user: str | None = None
    session_id: str | None = None
    prompt: msgspec.Raw = ABSENT
    messages: msgspec.Raw = ABSENT
    prompt_embeds: msgspec.Raw = ABSENT
    tools: msgspec.Raw = ABSENT
    documents: msgspec.Raw = ABSENT
    chat_template_kwargs: msgspec.Raw = ABSENT
    response_format: msgspec.Raw = ABSENT
    stream_options: msgspec.Raw = ABSENT
    service_tier: msgspec.Raw = ABSENT
    kv_transfer_params: msgspec.Raw = ABSENT
    ec_transfer_params: msgspec.Raw = ABSENT
    vllm_xargs: msgspec.Raw = ABSENT


class GenerateBody:
    """A body as received (``source``), its form, parsed fields, and ``stream_options``."""

    __slots__ = ("_fields", "form", "options", "read", "source", "stream", "wants_usage")

    def __init__(
        self,
        source: bytes,
        read: BodyFields,
        options: Fields,
        *,
        wants_usage: bool,
        form: ApiForm = CHAT,
    ) -> None:
        self.source = source
        self.form = form
        self.read = read
        self.options = options
        self.stream = form.streams and read.stream is True
        self.wants_usage = wants_usage
        self._fields: Fields | None = None

    @property
    def fields(self) -> Fields:
        """The JSON of each field by name."""
        if self._fields is None:
            self._fields = _fields.decode(self.source)
        return self._fields

    @property
    def model(self) -> str | None:
        return self.read.model

    @property
    def user(self) -> str | None:
        return self.read.user

    @property
    def session(self) -> str | None:
        return self.read.session_id

    @property
    def ignore_eos(self) -> bool:
        return self.read.ignore_eos is True

    @property
    def echo(self) -> bool:
        return self.read.echo is True

    @property
    def return_token_ids(self) -> bool:
        return self.read.return_token_ids is True

    @property
    def priority(self) -> int | None:
        priority = self.read.priority
        return None if priority is msgspec.UNSET else priority

    @property
    def truncated_tokens(self) -> int | None:
        """The tokens to which the prompt is truncated; -1, the context length, sets no limit."""
        limit = self.read.truncate_prompt_tokens
        return limit if limit is not None and limit > 0 else None

    @property
    def output_limit(self) -> int | None:
        """The client's limit of output tokens, if any, capped to exact floats."""
        form, read = self.form, self.read
        if form.limit:
            limit: int | None = getattr(read, form.limit)
        else:
            limit = read.max_completion_tokens
            limit = read.max_tokens if limit is None else limit
        return None if limit is None else max(1, min(_MOST_TOKENS, limit))

    @property
    def lacks_usage(self) -> bool:
        """Whether OServe must ask for the usage report of the stream."""
        return self.form.is_completion and not self.wants_usage

    @property
    def may_return_ids(self) -> bool:
        """Whether OServe may request token ids: a stream whose text they do not change."""
        movable = self.form.is_completion and self.stream and not self.echo
        return movable and bytes(self.read.tools) in _NO_TOOLS


_BOM = b"\xef\xbb\xbf"
# No engine generates more, and floats are exact up to here.
_MOST_TOKENS = 1 << 31
_NO_TOOLS = {b"", b"null", b"[]"}
_HALF_PAIR = re.compile(
    rb"\\u[dD][89abAB]..(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB]..)\\u[dD][c-fC-F]"
)
_EC_FIELD = "ec_transfer_params"
_EXTRA = "vllm_xargs"
# Spellings that engines accept as well; forms and shell scripts write them.
_TRUE = {"1", "on", "t", "true", "y", "yes"}
_FALSE = {"0", "off", "f", "false", "n", "no"}
_INTEGER = re.compile(r"\s*([+-]?[0-9]+(?:_[0-9]+)*)(?:\.0*)?\s*")

_fields = msgspec.json.Decoder(Fields)
_read = msgspec.json.Decoder(BodyFields)
_RAW = tuple(item.name for item in msgspec.structs.fields(BodyFields) if item.default is ABSENT)


def parse_body(body: bytes, form: ApiForm = CHAT) -> GenerateBody:
    """Validate a body; raises an ApiError that names the fault and its field."""
    body = body.removeprefix(_BOM)
    try:
        if not body.isascii():
            body.decode()
        read = _read.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        # The body is invalid, or has a spelling that only engines accept.
        read = read_leniently(body)
    _refuse_transfers(read)
    options = _object(read.stream_options, "stream_options")
    wants_usage = bool(options) and _flag(options, "include_usage", within="stream_options") is True
    return GenerateBody(body, read, options, wants_usage=wants_usage, form=form)


def read_leniently(body: bytes) -> BodyFields:
    """Read a body field by field, in every spelling that engines accept; raises ApiError."""
    fields = _fields_of(body)
    raw = {name: fields[name] for name in _RAW if name in fields}
    return BodyFields(
        model=_text(fields, "model"),
        stream=_flag(fields, "stream"),
        max_tokens=_integer(fields, "max_tokens"),
        max_completion_tokens=_integer(fields, "max_completion_tokens"),
        max_output_tokens=_integer(fields, "max_output_tokens"),
        truncate_prompt_tokens=_integer(fields, "truncate_prompt_tokens"),
        ignore_eos=_flag(fields, "ignore_eos"),
        priority=_integer(fields, "priority") if "priority" in fields else msgspec.UNSET,
        return_token_ids=_flag(fields, "return_token_ids")
        if "return_token_ids" in fields
        else msgspec.UNSET,
        echo=_flag(fields, "echo"),
        user=_text(fields, "user"),
        session_id=_text(fields, "session_id"),
        **raw,
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


def _flag(fields: Fields, name: str, *, within: str = "") -> bool | None:
    value = _value(fields, name, within)
    if value is None or isinstance(value, bool):
        return value
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
    """A value that engines accept as a boolean; ValueError if they do not."""
    word = str(value).lower() if isinstance(value, str | int | float) else ""
    word = word.removesuffix(".0")
    if word in _TRUE or word in _FALSE:
        return word in _TRUE
    raise ValueError("Expected true or false")


def as_integer(value: object) -> int:
    """A value that engines accept as an integer; ValueError if they do not."""
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return int(value)
    found = _INTEGER.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        raise ValueError("Expected an integer")
    return int(found[1])


def _object(raw: msgspec.Raw, name: str) -> Fields:
    if not raw or bytes(raw) == b"null":
        return {}
    try:
        return _fields.decode(raw)
    except (msgspec.DecodeError, RecursionError):
        raise _wrong(name, "", "Expected an object") from None


def _refuse_transfers(read: BodyFields) -> None:
    """Refuse requests that name a KV cache to load.

    Otherwise a client could make an engine start from the cache of another prompt.
    """
    kv, ec, extra = read.kv_transfer_params, read.ec_transfer_params, read.vllm_xargs
    if not (kv or ec or extra):
        return
    for name, given in ((FIELD, kv), (_EC_FIELD, ec)):
        for key, raw in _object(given, name).items():
            if bytes(raw) not in {b"null", b"false"}:
                reason = "only OServe may request cache transfers; leave it out"
                raise _wrong(key[:64], name, reason)
    arguments = _object(extra, _EXTRA)
    for key in (FIELD, _EC_FIELD):
        if key in arguments:
            raise _wrong(key, _EXTRA, "this is no extra argument; leave it out")


def with_fields(
    parsed: GenerateBody,
    *,
    priority: int | None,
    model: str,
    token_ids: bool = False,
    cache: Mapping[str, str] | None = None,
    cache_salt: str = "",
) -> bytes:
    """The body for a replica, with a priority, a usage report, and its name of the model if not "".

    ``cache_salt``: takes the place of the client's.
    ``token_ids``: request the token ids of prompt and answer. ``cache``: the parameters of a KV
    cache transfer (see ``wire.caches``).
    """
    read = parsed.read
    added: dict[str, Any] = {}
    # Whether a present field must be replaced or removed.
    replaces = bool(model)
    if model:
        added["model"] = model
    if priority is not None:
        added["priority"] = priority
    replaces = replaces or read.priority is not msgspec.UNSET
    if parsed.stream and parsed.lacks_usage:
        added["stream_options"] = _with_usage(parsed.options)
        replaces = replaces or bool(read.stream_options)
    if token_ids and not parsed.return_token_ids:
        added["return_token_ids"] = True
        replaces = replaces or read.return_token_ids is not msgspec.UNSET
    if cache:
        added[FIELD] = cache
        replaces = replaces or bool(read.kv_transfer_params)
    if cache_salt:
        added[SALT_FIELD] = cache_salt
        replaces = replaces or gives_salt(parsed)
    if not added and (read.priority is msgspec.UNSET or priority is not None):
        return parsed.source
    return _replaced(parsed, added) if replaces else _appended(parsed.source, added)


def gives_salt(parsed: GenerateBody) -> bool:
    """Whether the client sends a ``cache_salt`` of its own."""
    return SALT_FIELD.encode() in parsed.source and SALT_FIELD in parsed.fields


def _replaced(parsed: GenerateBody, added: dict[str, Any]) -> bytes:
    others = {name: raw for name, raw in parsed.fields.items() if name != "priority"}
    return msgspec.json.encode({**others, **added})


def _appended(source: bytes, added: dict[str, Any]) -> bytes:
    """The JSON object with new fields appended; it must have none of them."""
    given = source.rstrip()[:-1].rstrip()
    comma = b"" if given.endswith(b"{") else b","
    return given + comma + msgspec.json.encode(added)[1:]


def _with_usage(options: Fields) -> dict[str, Any]:
    """Report usage at the end; interim reports only if the client requested usage itself."""
    off = {"continuous_usage_stats": False} if "continuous_usage_stats" in options else {}
    return {**options, "include_usage": True, **off}
