"""Who sends a request: what the gateway knows of a caller once the API key is checked."""

from dataclasses import dataclass
from enum import StrEnum

DEFAULT_TENANT = "default"
"""The tenant of requests without a key, where none is required, and of the keys of the settings."""


class KeyRole(StrEnum):
    """What a key may do: send requests, or also change the fleet and see every tenant."""

    USE = "use"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """The tenant and the role of an API key, and the tiers its requests may ask for.

    ``tier`` is the tier of requests that name none; None leaves it to the settings.
    ``allowed_tiers`` bounds what a request may name; empty allows every tier. ``key`` is the id of
    the key, which is no secret; empty without a key.
    """

    tenant: str = DEFAULT_TENANT
    role: KeyRole = KeyRole.USE
    tier: str | None = None
    allowed_tiers: tuple[str, ...] = ()
    key: str = ""

    @property
    def is_admin(self) -> bool:
        """True if the caller may change the fleet and see every tenant."""
        return self.role is KeyRole.ADMIN

    def may_use(self, tier: str) -> bool:
        """Say whether a request of the caller may ask for ``tier``."""
        return not self.allowed_tiers or tier in self.allowed_tiers
