"""The head of a response (RFC 9112, 4-6). Pure."""

import re
from dataclasses import dataclass
from functools import lru_cache

_VERSIONS = {b"HTTP/1.1", b"HTTP/1.0"}
_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_CONTROL = re.compile(rb"[\x00\r\n]")
_CONTINUE, _SWITCHING = 100, 101
_BODILESS = {204, 304}
# Servers repeat a head byte by byte, at least within the second that its date tells.
_KNOWN_HEADS = 256
_KNOWN_HEAD_BYTES = 2048


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ResponseHead:
    """Equal heads may be one object.

    ``length`` is the Content-Length; ``None`` for a chunked or close-delimited body.
    ``keep_alive``: the server takes another request on the connection.
    """

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    length: int | None
    chunked: bool
    keep_alive: bool = True


def read_head(text: bytes) -> ResponseHead:
    """A head without the empty line at its end; ValueError says what is wrong with it."""
    return _known(text) if len(text) <= _KNOWN_HEAD_BYTES else _read(text)


def _read(text: bytes) -> ResponseHead:
    version, status, headers = _parts(text)
    fields = dict(headers)
    chunked = b"chunked" in fields.get(b"transfer-encoding", b"").lower()
    close = b"close" in fields.get(b"connection", b"").lower() or version == b"HTTP/1.0"
    told = fields.get(b"content-length")
    length = None if told is None or chunked else int(told)
    if status in _BODILESS:
        chunked, length = False, 0
    return ResponseHead(
        status=status, headers=headers, length=length, chunked=chunked, keep_alive=not close
    )


_known = lru_cache(maxsize=_KNOWN_HEADS)(_read)


def _parts(text: bytes) -> tuple[bytes, int, tuple[tuple[bytes, bytes], ...]]:
    """Version, status and fields.

    Servers may leave the reason phrase out, some with the space before it.
    """
    first, *lines = text.split(b"\r\n")
    version, _, status = first.partition(b" ")
    code = status[:3]
    if version not in _VERSIONS or not code.isdigit() or status[3:4] not in {b"", b" "}:
        raise ValueError("status line")
    headers = tuple(map(_field, lines))
    lengths = {value for name, value in headers if name == b"content-length"}
    if len(lengths) > 1 or not all(value.isdigit() and len(value) < 16 for value in lengths):
        raise ValueError("content-length")
    if int(code) < _CONTINUE or int(code) == _SWITCHING:
        raise ValueError("status")
    return version, int(code), headers


def _field(line: bytes) -> tuple[bytes, bytes]:
    name, colon, value = line.partition(b":")
    # A line end or NUL within would become another field where it is passed on.
    if not colon or not _NAME.fullmatch(name) or _CONTROL.search(value):
        raise ValueError("header")
    return name.lower(), value.strip(b" \t")
