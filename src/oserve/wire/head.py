"""What the head of a request asks for, and what is wrong with it (RFC 9112; RFC 3986). Pure."""

import re
from collections.abc import Mapping

_ESCAPE = re.compile(rb"%([0-9A-Fa-f]{2})")
_UNRESERVED = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
_AUTHORITY = re.compile(
    rb"(?:[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})*(?::[0-9]*)?|\[[0-9A-Fa-f:.]+\](?::[0-9]*)?"
)
_ABSOLUTE = re.compile(rb"https?://([^/?]*)(.*)", re.IGNORECASE | re.DOTALL)


def valid_host(value: bytes) -> bool:
    """Whether a Host field names a host, and perhaps a port; it may be empty."""
    return _AUTHORITY.fullmatch(value) is not None


def origin_form(target: bytes, method: bytes) -> bytes:
    """Path and query that a request target names; empty where its form is none that is served.

    Of the absolute form the host is left out: one service answers under every name. Escapes of
    characters that need none are undone, so that two spellings of a path are one; others stay.
    """
    if target == b"*":
        return target if method == b"OPTIONS" else b""
    if not target.startswith(b"/"):
        absolute = _ABSOLUTE.fullmatch(target)
        if absolute is None or not absolute[1] or not valid_host(absolute[1]):
            return b""
        target = absolute[2] if absolute[2].startswith(b"/") else b"/" + absolute[2]
    if b"#" in target:
        return b""
    path, mark, query = target.partition(b"?")
    if b"%" in path:
        path = _ESCAPE.sub(_unescaped, path)
    return path + mark + query


def _unescaped(found: re.Match[bytes]) -> bytes:
    code = int(found[1], 16)
    return bytes((code,)) if code in _UNRESERVED else found[0]


def fault_of_head(
    method: bytes, path: bytes, version: str, headers: Mapping[bytes, bytes]
) -> tuple[int, str] | None:
    """Status and words for a head that is not HTTP/1.1 as served here, or is read in two ways.

    ``path`` is what ``origin_form`` made of the target.
    """
    host, coding = headers.get(b"host"), headers.get(b"transfer-encoding")
    old = version == "1.0"
    faults = (
        (version not in {"1.0", "1.1"}, 505, "this server speaks HTTP/1.1"),
        (method == b"CONNECT", 501, "this server is no proxy"),
        (
            (host is None and not old) or not valid_host(host or b""),
            400,
            "a request needs one Host field that names a host",
        ),
        (old and coding is not None, 400, "HTTP/1.0 has no transfer codings"),
        (
            coding is not None and coding.lower() != b"chunked",
            501,
            "the only transfer coding understood is chunked",
        ),
        (not path, 400, "the request target is not of a form that is served here"),
    )
    return next(((status, words) for wrong, status, words in faults if wrong), None)
