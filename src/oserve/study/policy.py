"""What a policy is: a deployment to begin with, and decisions on what was seen.

Most decide once an interval; one that steers is asked every second.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from oserve.core import DeploymentPlan, Observation
from oserve.evaluate.simulator import Serving, Traffic
from oserve.sim.types import FleetObservation


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


class Start(StrEnum):
    """How replicas come up.

    ``cold``: from disk. ``transfer``: weights come from other devices (``moving``). ``free``: they
    are there at once and the devices of draining ones count as free, which no real system can do.
    """

    COLD = "cold"
    TRANSFER = "transfer"
    FREE = "free"


@dataclass(frozen=True, slots=True, kw_only=True)
class Conduct:
    """How a policy's changes are carried out.

    ``decides``: it takes decisions, each interval. ``steers``: it is a ``Steering`` one.
    ``staged``: a quarter of the replicas at a time, as on a live server; else all at once.
    ``knows_outputs``: the router is told true output lengths. ``drain_limit_s``: by then requests
    on a replica that leaves go on elsewhere, with the tokens they have.
    """

    decides: bool = False
    steers: bool = False
    staged: bool = True
    start: Start = Start.COLD
    drain_limit_s: float = 600.0
    knows_outputs: bool = False

    @property
    def free(self) -> bool:
        """Whether replicas start in no time."""
        return self.start is Start.FREE


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """What a steering policy sees each second.

    ``came``: requests from the first number up to before the second. ``ended``: numbers with their
    statuses. ``plan`` is what is aimed at, ``switching`` whether the cluster is not there yet.
    ``queued`` requests wait at the gateway.
    """

    now_s: float
    observation: Observation
    came: tuple[int, int]
    ended: tuple[tuple[int, int], ...]
    plan: DeploymentPlan
    switching: bool
    queued: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Steer:
    """``plan``: go there. ``routed``: route by its shares from now on. ``None``: as before."""

    plan: DeploymentPlan | None = None
    routed: DeploymentPlan | None = None


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


class Steering(Policy, Protocol):
    """One that is asked every second."""

    def begin(self, traffic: Traffic) -> None:
        """A run begins."""
        ...

    def second(self, moment: Moment) -> Steer:
        """A second has passed."""
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
