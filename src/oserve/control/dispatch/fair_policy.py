"""The policy of fair shares between tenants."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class FairPolicy:
    """``weights`` by tenant, ``default_weight`` for others.

    ``debt_s``: by how many device-seconds a tenant may go before its turn for the sake of a cached
    prefix; 0: never. ``reserve``: the part of a replica's slots that tenants with more than their
    share of all slots leave free while others are active.
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    default_weight: float = 1.0
    debt_s: float = 0.0
    reserve: float = 0.03

    def weight(self, tenant: str) -> float:
        """The weight of a tenant."""
        return self.weights.get(tenant, self.default_weight)
