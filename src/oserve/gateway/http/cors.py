"""Leave for scripts of web pages from other origins (CORS, in the Fetch standard). Pure."""

import re
from collections.abc import Iterable, Mapping

from oserve.core import OServeError
from oserve.gateway.http.headers import Headers

_ANY = "*"
# Browsers ask again after this time; Chromium keeps an answer for at most two hours.
_MAX_AGE_S = 600
_ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^/\s?#A-Z]+")


class AllowedOrigins:
    """Which origins may read answers: ``scheme://host[:port]`` each, or ``*`` for all of them.

    Callers show a key and no cookie, so answers never allow the Fetch standard's credentials.
    Raises OServeError for what no browser sends as an origin.
    """

    def __init__(self, origins: Iterable[str]) -> None:
        given = tuple(origins)
        for origin in given:
            if not _ORIGIN.fullmatch(origin):
                raise OServeError(
                    f"{origin!r} is no origin of web pages",
                    place="gateway.allowed_origins",
                    remedy="write scheme and host in lower case, as in https://chat.example.org, "
                    "with a port if it is not the usual one and without a path; or * for all",
                )
        self._origins = frozenset(origin.encode() for origin in given)
        self._any = _ANY.encode() in self._origins

    def fields(self, request: Mapping[bytes, bytes]) -> Headers:
        """What each answer to a request with these headers has."""
        if not self._origins:
            return ()
        given = request.get(b"origin", b"")
        if self._any:
            return _readable(b"*") if given else ()
        # Caches must not give one origin the answer to another.
        vary = ((b"vary", b"origin"),)
        return (*_readable(given), *vary) if given in self._origins else vary

    def preflight(self, request: Mapping[bytes, bytes], methods: tuple[bytes, ...]) -> Headers:
        """What the answer to OPTIONS has besides, if a browser asks before it sends a request."""
        wanted = request.get(b"access-control-request-headers", b"")
        allowed = self._any or request.get(b"origin", b"") in self._origins
        if not allowed or b"access-control-request-method" not in request:
            return ()
        return (
            (b"access-control-allow-methods", b", ".join(methods)),
            # A wildcard would not cover Authorization.
            *(((b"access-control-allow-headers", wanted),) if wanted else ()),
            (b"access-control-max-age", b"%d" % _MAX_AGE_S),
        )


def _readable(origin: bytes) -> Headers:
    return ((b"access-control-allow-origin", origin), (b"access-control-expose-headers", b"*"))
