"""The policy of fair shares between tenants."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class FairPolicy:
    """``weights`` by tenant, ``default_weight`` for others.

    ``debt_s``: by how many device-seconds a tenant may go before its turn for the sake of a cached
    prefix; 0: never. ``reserve``: the part of a replica's slots that tenants with more than their
    share of all slots leave free while others are active: for ``active_s`` after an arrival.
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    default_weight: float = 1.0
    debt_s: float = 0.0
    reserve: float = 0.03
    active_s: float = 60.0

    def weight(self, tenant: str) -> float:
        """The weight of a tenant."""
        return self.weights.get(tenant, self.default_weight)


def tight_inflight(max_inflight: int, reserve: float) -> tuple[int, int]:
    """The most in flight at a replica for who leaves this part of its running sequences free.

    The second is while the replica owes prompts: the last of its slots are filled with one prompt
    at a time, so that the steps of a full batch stay short.
    """
    # Half of what a replica takes runs, the rest waits in the engine.
    running = max_inflight // 2
    spare = math.ceil(reserve * running)
    return max(1, running - spare), max(1, running - 2 * spare)
