"""The constants of dispatch that a gateway can change while it serves.

They say how requests are ordered, when one is late, and how much a replica may hold. A routing
table may carry them, so that they reach all gateway processes as a table does. The simulator
serves with the same values.
"""

from dataclasses import dataclass, field

from oserve.control.dispatch.order import OrderPolicy
from oserve.control.dispatch.overload import OverloadPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchConstants:
    """``overflow_s``: outstanding work of its pool past which a request may leave the pool.

    ``inflight_per_device``: the most requests in flight at a replica, per device; ``None``: as many
    as the engine's sequence limit implies.
    """

    order: OrderPolicy = field(default_factory=OrderPolicy)
    overload: OverloadPolicy = field(default_factory=OverloadPolicy)
    overflow_s: float = 2.0
    inflight_per_device: float | None = None


def most_inflight(*, usual: int, devices: int, per_device: float | None) -> int:
    """The bound on requests in flight at a replica of so many ``devices``, at least 1.

    ``usual``: the bound that the engine's sequence limit implies; no other raises it.
    """
    return usual if per_device is None else max(1, min(usual, round(per_device * devices)))
