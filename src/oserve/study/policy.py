"""What a policy is: a deployment to start with, and decisions based on what was observed.

Most policies decide once an interval; a ``ControlledPolicy`` has a session that runs every second.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from oserve.control.decision import Decision
from oserve.core import DeploymentPlan, Observation
from oserve.evaluate.simulator import SimulatedServing, SimulatedTraffic
from oserve.sim.types import FleetObservation


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PolicyView:
    """What a policy may know at ``now_s``.

    ``recent``: the arrivals of the last ``recent_s`` seconds, on a clock that starts there. Output
    lengths of requests that still run are those expected of their class. ``counts``: arrivals by
    past interval (the latest last) and length class. Policies decide only when no switch is under
    way, so ``plan`` is what runs.
    """

    now_s: float
    recent: SimulatedTraffic
    recent_s: float
    counts: NDArray[np.int64]
    fleet: FleetObservation
    plan: DeploymentPlan


class PolicyStart(StrEnum):
    """How replicas start.

    ``cold``: they read their weights from disk. ``transfer``: weights come from other devices, see
    ``transfers``. ``free``: replicas serve at once, and devices of draining ones count as free,
    which no real system can do.
    """

    COLD = "cold"
    TRANSFER = "transfer"
    FREE = "free"


@dataclass(frozen=True, slots=True, kw_only=True)
class Conduct:
    """How the changes of a policy are carried out.

    ``decides``: the policy decides, once an interval. ``staged``: a quarter of the replicas at a
    time, as on a live server; else all at once. ``knows_outputs``: the router knows the true output
    lengths. ``drain_limit_s``: requests that still run on a draining replica after that time move
    to others, with the tokens that they have.
    """

    decides: bool = False
    staged: bool = True
    start: PolicyStart = PolicyStart.COLD
    drain_limit_s: float = 600.0
    knows_outputs: bool = False

    @property
    def free(self) -> bool:
        """Whether replicas start in no time."""
        return self.start is PolicyStart.FREE


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """What a session sees each second.

    ``came``: the first request number that arrived, and the one after the last. ``ended``: numbers
    of ended requests with their statuses. ``plan``: the target; ``switching``: whether the cluster
    has not reached it. ``queued`` requests wait at the gateway.
    """

    now_s: float
    observation: Observation
    came: tuple[int, int]
    ended: tuple[tuple[int, int], ...]
    plan: DeploymentPlan
    switching: bool
    queued: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyUpdate:
    """``plan``: the new target. ``routed``: the new routing shares. ``None``: no change."""

    plan: DeploymentPlan | None = None
    routed: DeploymentPlan | None = None


class Policy(Protocol):
    """One way to run a cluster."""

    @property
    def conduct(self) -> Conduct:
        """How its changes are carried out."""
        ...

    def initial(self, scale: float) -> SimulatedServing:
        """What serves from the first second, warm, for traffic ``scale`` times as fast."""
        ...

    def decide(self, seen: PolicyView) -> DeploymentPlan | None:
        """Another plan, or ``None`` to stay."""
        ...


class PolicySession(Protocol):
    """One run of a ``ControlledPolicy``."""

    @property
    def decisions(self) -> Sequence[Decision]:
        """The decisions so far."""
        ...

    def second(self, moment: Moment) -> PolicyUpdate:
        """A second has passed."""
        ...

    def reached(self, plan: DeploymentPlan) -> None:
        """A switch by moving weights has ended in this plan."""
        ...


@runtime_checkable
class ControlledPolicy(Policy, Protocol):
    """A policy that is asked every second."""

    def begin(self, traffic: SimulatedTraffic) -> PolicySession:
        """A run of this traffic begins."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Fixed:
    """A deployment that never changes."""

    serving: SimulatedServing
    conduct: Conduct = Conduct()

    def initial(self, scale: float) -> SimulatedServing:
        """See ``Policy``."""
        del scale
        return self.serving

    def decide(self, seen: PolicyView) -> DeploymentPlan | None:
        """See ``Policy``."""
        del seen
        return None
