"""The target of a request and the faults of its head (RFC 9112; RFC 3986). Pure."""

import re
from collections.abc import Mapping

_ESCAPE = re.compile(rb"%([0-9A-Fa-f]{2})")
_UNRESERVED = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
_AUTHORITY = re.compile(
    rb"(?:[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})*(?::[0-9]*)?|\[[0-9A-Fa-f:.]+\](?::[0-9]*)?"
)
_VERSIONS = frozenset({"1.0", "1.1"})
_ABSOLUTE = re.compile(rb"https?://([^/?]*)(.*)", re.IGNORECASE | re.DOTALL)


def valid_host(value: bytes) -> bool:
    """Whether a Host field is a host with an optional port; it may be empty."""
    return _AUTHORITY.fullmatch(value) is not None


def origin_form(target: bytes, method: bytes) -> bytes:
    """Path and query that a request target names; empty if its form is not served.

    The host of the absolute form is dropped: one service answers under every name. Escapes of
    unreserved characters are undone, so that two spellings of a path are one; others stay.
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
    """Status and message for a head that is not HTTP/1.1 as served here, or that is ambiguous.

    ``path`` is what ``origin_form`` returned for the target.
    """
    if version not in _VERSIONS:
        return 505, "this server speaks HTTP/1.1"
    if method == b"CONNECT":
        return 501, "this server is no proxy"
    host = headers.get(b"host")
    if (host is None and version != "1.0") or not valid_host(host or b""):
        return 400, "a request needs one Host field that names a host"
    coding = headers.get(b"transfer-encoding")
    if coding is not None and version == "1.0":
        return 400, "HTTP/1.0 has no transfer codings"
    if coding is not None and coding.lower() != b"chunked":
        return 501, "the only transfer coding understood is chunked"
    return None if path else (400, "the request target is not of a form that is served here")
