"""What a request line and a Host field say is asked for (RFC 9112, section 3; RFC 3986)."""

import re

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
