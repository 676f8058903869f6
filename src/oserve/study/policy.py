"""What a policy is: a deployment to begin with, and a decision each interval from what was seen."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from oserve.app.simulated import Serving, Traffic
from oserve.core import DeploymentPlan
from oserve.sim.words import FleetObservation


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Seen:
    """What a policy may know at ``now_s``.

    ``recent``: what arrived in the last ``recent_s`` seconds, on a clock that begins there; output
    lengths of requests that have not ended are those expected of their class. ``counts`` are
    arrivals by past interval (the latest last) and length class. Decisions are asked for only when
    no switch is under way, so ``plan`` is what runs.
    """

    now_s: float
    recent: Traffic
    recent_s: float
    counts: NDArray[np.int64]
    fleet: FleetObservation
    plan: DeploymentPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Conduct:
    """How a policy's changes are carried out.

    ``decides``: it takes decisions at all. ``moving_devices``: so many devices may be out of
    service at once during a switch; ``None``: all. ``free``: replicas are there at once and the
    devices of draining ones count as free, which no real system can do. ``knows_outputs``: the
    router is told true output lengths.
    """

    decides: bool = False
    moving_devices: int | None = None
    free: bool = False
    knows_outputs: bool = False


class Policy(Protocol):
    """One way to run a cluster."""

    @property
    def conduct(self) -> Conduct: ...

    def initial(self, scale: float) -> Serving:
        """What serves from the first second, for traffic ``scale`` times as fast; warm."""
        ...

    def decide(self, seen: Seen) -> DeploymentPlan | None:
        """Another plan, or ``None`` to stay."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Fixed:
    """A deployment that never changes."""

    serving: Serving
    conduct: Conduct = Conduct()

    def initial(self, scale: float) -> Serving:
        del scale
        return self.serving

    def decide(self, seen: Seen) -> DeploymentPlan | None:
        del seen
        return None
