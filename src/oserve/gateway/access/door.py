"""The door: who is calling, and what that caller may do."""

import time
from collections.abc import Iterable
from pathlib import Path

from oserve.core import Caller, KeyRole
from oserve.gateway.access.failures import FailureLimiter
from oserve.gateway.access.key_file import KeyFile
from oserve.gateway.access.keys import KeyDocument, KeyRing, guessable
from oserve.gateway.http.errors import ApiError, overloaded, with_status

OPEN_CALLER = Caller(role=KeyRole.ADMIN)
"""Everybody, while no key is configured."""

_NOBODY = KeyRing(b"", ())
# Headers with a valid key whose callers are kept.
_MOST_KNOWN = 4096
_MOST_HEADER_BYTES = 256


class Door:
    """The keys of one gateway process: those of the settings, and those of the key file.

    Without either the gateway is open. A key file, even an empty one, closes it. Where there is no
    such file, the hub sends its content.
    """

    def __init__(self, given: Iterable[str] = (), path: Path | None = None) -> None:
        given = frozenset(given)
        self._strong = KeyRing.of_settings(key for key in given if not guessable(key))
        self._weak = KeyRing.of_settings(key for key in given if guessable(key))
        self._made = _NOBODY
        self.guarded = bool(given)
        self._failures = FailureLimiter()
        # By Authorization header, so that a client's next request costs no hash.
        self._known: dict[bytes, Caller] = {}
        self._file = None if path is None else KeyFile(path, self.use)
        self.check()

    def use(self, document: KeyDocument) -> None:
        """Replace the keys of the key file."""
        self._made = KeyRing.of_document(document)
        self._known = {}
        self.guarded = True

    def check(self) -> None:
        """Read the key file again if it has changed; cheap if it has not."""
        if self._file is not None:
            self._file.check()

    def cache_salt(self, tenant: str, own: bytes) -> str:
        """The salt of a tenant's cached prefixes, which nobody else can find out.

        ``own``: the salt that the client sent, which divides the tenant's cache further.
        """
        return self._made.derived(b"cache\0%b\0%b" % (tenant.encode(), own))

    def caller(self, authorization: bytes, peer: str) -> Caller:
        """Who sends this Authorization header. Raises ApiError: 401, or 429 after many failures.

        Keys that cannot be guessed always pass. Tries at others are limited by source.
        """
        if not self.guarded:
            return OPEN_CALLER
        known = self._known.get(authorization)
        if known is not None:
            return known
        scheme, _, token = authorization.partition(b" ")
        token = token.strip() if scheme.lower() == b"bearer" else b""
        if token:
            found = self._made.find(token) or self._strong.find(token)
            if found is not None:
                if len(self._known) >= _MOST_KNOWN:
                    self._known = {}
                if len(authorization) <= _MOST_HEADER_BYTES:
                    self._known[authorization] = found
                return found
        now_s = time.monotonic()
        wait_s = self._failures.wait_s(peer, now_s)
        if wait_s > 0.0:
            raise overloaded(
                "Too many wrong API keys from this address",
                retry_after_s=max(1, round(wait_s)),
                code="too_many_wrong_keys",
            )
        found = self._weak.find(token) if token and len(self._weak) else None
        if found is None:
            self._failures.failed(peer, now_s)
            raise with_status(401, "Missing or wrong API key", code="invalid_api_key")
        return found


def admin_needed() -> ApiError:
    """403: the key is valid, but its role is not enough."""
    return ApiError(
        status=403,
        message="This needs an API key with the role admin",
        type="permission_error",
        code="admin_required",
    )
