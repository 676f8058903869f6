"""Server URLs as people write them."""

import re
from urllib.parse import urlsplit

from oserve.core.errors import OServeError

_EXAMPLES = "for example http://127.0.0.1:8000, gpu-box:8000 or https://host/path/v1"
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_PORT = re.compile(r":?([0-9]{1,5})")
# A host name or address. Underscores are not legal, but container networks use them.
_HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?\.?")
# Paths that people copy along with a base URL, longest first.
_ENDPOINTS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/models",
    "/oserve/v1/status",
    "/oserve/v1/switch",
    "/oserve/v1/nodes",
    "/oserve/v1/plan",
    "/oserve/v1",
    "/health",
    "/metrics",
    "/v1",
)


def server_url(text: str, *, place: str = "--url") -> str:
    """The base URL to which paths such as ``/v1/models`` are appended, without a trailing slash.

    Accepts ``host``, ``host:port``, ``:port`` or a port, with or without a scheme (``http`` by
    default), with a path, a trailing slash, or an API path that was copied along. It keeps any path
    before the API's: ``https://host/llm/v1/`` gives ``https://host/llm``. Raises OServeError.
    """
    given = text.strip()
    if not given:
        raise _error("it is empty", place)
    port = _PORT.fullmatch(given)
    if port:
        given = f"127.0.0.1:{port[1]}"
    elif given.startswith(":"):
        given = f"127.0.0.1{given}"
    if not _SCHEME.match(given):
        given = f"http://{given.removeprefix('//')}"
    try:
        parts = urlsplit(given)
        number = parts.port
    except ValueError as error:
        raise _error(f"{text!r} is not a URL: {error}", place) from None
    if parts.scheme not in {"http", "https"}:
        raise _error(f"{text!r} has a scheme other than http and https", place)
    host = parts.hostname or ""
    if not (_HOST.fullmatch(host) or ":" in host) or parts.netloc.endswith(":"):
        raise _error(f"{text!r} names no host", place)
    if parts.username is not None or parts.password is not None:
        raise OServeError(
            "it contains a user name or password", place=place, remedy="use --api-key instead"
        )
    if parts.query or parts.fragment:
        raise _error(f"{text!r} has a query or fragment", place)
    if re.search(r"[\x00-\x20\x7f]", parts.path) or number == 0:
        raise _error(f"{text!r} is not a URL", place)
    path = parts.path.rstrip("/")
    while ending := next((item for item in _ENDPOINTS if path.endswith(item)), ""):
        path = path.removesuffix(ending).rstrip("/")
    shown = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{shown}{'' if number is None else f':{number}'}{path}"


def _error(message: str, place: str) -> OServeError:
    return OServeError(message, place=place, remedy=_EXAMPLES)
