"""API keys: how they are made, stored and looked up.

A made key has 256 random bits, so a fast keyed hash is enough: whoever reads the file can neither
invert it nor guess. The hash's salt is secret as well, so the time of a lookup by hash tells a
client nothing about other keys. One lookup costs the same for one key and for a million.
"""

import hashlib
import hmac
import secrets
from collections.abc import Iterable

import msgspec

from oserve.core import DEFAULT_TENANT, Caller, KeyRole

KEY_PREFIX = "oserve-"
SETTINGS_KEY = "settings"
"""The id of keys from the settings."""

_SECRET_BYTES = 32
_ID_BYTES = 6
_SALT_BYTES = 32
# Longer tokens are no keys; hashing them would only cost time.
_MOST_TOKEN_BYTES = 1024
# Shorter keys, which people choose, could be guessed: tries at them are limited.
_STRONG_BYTES = 24
_DIGEST_BYTES = 32
# Secrets that are kept, so that a client's next request costs no hash.
_MOST_DERIVED = 4096
_MOST_NAME_BYTES = 256


class StoredKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One key of the key file. ``digest``: keyed hash of the key, hexadecimal.

    ``created_s``: Unix time. ``tier`` and ``tiers``: see ``Caller``.
    """

    id: str
    tenant: str
    role: KeyRole
    digest: str
    created_s: float
    tier: str | None = None
    tiers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        bytes.fromhex(self.digest)

    def caller(self) -> Caller:
        """What the gateway knows of who shows this key."""
        return Caller(
            tenant=self.tenant,
            role=self.role,
            tier=self.tier,
            allowed_tiers=self.tiers,
            key=self.id,
        )


class KeyDocument(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The key file. ``salt``: the secret of the keyed hashes, hexadecimal.

    Raises ValueError for a salt or hash that is not one.
    """

    salt: str
    keys: tuple[StoredKey, ...] = ()

    def __post_init__(self) -> None:
        digest(b"", bytes.fromhex(self.salt))


def empty_document() -> KeyDocument:
    """A key file without keys."""
    return KeyDocument(salt=secrets.token_hex(_SALT_BYTES))


def made_key() -> tuple[str, str]:
    """A new key and its id."""
    return secrets.token_hex(_ID_BYTES), KEY_PREFIX + secrets.token_urlsafe(_SECRET_BYTES)


def digest(token: bytes, salt: bytes) -> bytes:
    """The keyed hash of a key."""
    return hashlib.blake2b(token, key=salt, digest_size=_DIGEST_BYTES).digest()


class KeyRing:
    """Keys in memory, by their hashes. ``find`` is the hot path."""

    def __init__(self, salt: bytes, entries: Iterable[tuple[bytes, Caller]]) -> None:
        self._salt = salt
        self._derived: dict[bytes, str] = {}
        self._callers = {found: (found, caller) for found, caller in entries}

    @classmethod
    def of_document(cls, document: KeyDocument) -> "KeyRing":
        """The keys of the key file."""
        salt = bytes.fromhex(document.salt)
        return cls(
            salt,
            ((bytes.fromhex(key.digest), key.caller()) for key in document.keys),
        )

    @classmethod
    def of_settings(cls, keys: Iterable[str]) -> "KeyRing":
        """Keys that the settings give: of the default tenant, with every right."""
        salt = secrets.token_bytes(_SALT_BYTES)
        caller = Caller(tenant=DEFAULT_TENANT, role=KeyRole.ADMIN, key=SETTINGS_KEY)
        return cls(salt, ((digest(key.encode(), salt), caller) for key in keys))

    def __len__(self) -> int:
        return len(self._callers)

    def derived(self, name: bytes) -> str:
        """A secret that follows from the salt and this name, hexadecimal."""
        found = self._derived.get(name)
        if found is None:
            found = digest(name, self._salt).hex()
            if len(self._derived) >= _MOST_DERIVED:
                self._derived = {}
            if len(name) <= _MOST_NAME_BYTES:
                self._derived[name] = found
        return found

    def find(self, token: bytes) -> Caller | None:
        """Who shows this key; ``None``: it is not one of these."""
        if len(token) > _MOST_TOKEN_BYTES:
            return None
        given = digest(token, self._salt)
        found = self._callers.get(given)
        if found is None or not hmac.compare_digest(found[0], given):
            return None
        return found[1]


def guessable(key: str) -> bool:
    """Whether a key is so short that tries at it must be limited."""
    return len(key.encode()) < _STRONG_BYTES
