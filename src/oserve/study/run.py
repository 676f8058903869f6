"""The outcome of a policy's run."""

from dataclasses import dataclass

from oserve.control.decision import Decision
from oserve.core import DeploymentPlan
from oserve.evaluate.simulator import SimulatedTraffic
from oserve.sim.results import FleetResults
from oserve.study.usage import PeriodUse


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A change of the target plan: when, and its deployment (shape names and counts)."""

    at_s: float
    deployment: tuple[tuple[str, int], ...]
    plan: DeploymentPlan


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Run:
    """The outcome of a run.

    ``failed_early``: the run was stopped because it could no longer reach the SLO attainment.
    ``decisions`` are those of a controller, if there was one. ``periods`` say what was used up to
    each mark, and from the last one to the end.
    """

    results: FleetResults
    traffic: SimulatedTraffic
    changes: tuple[Change, ...]
    switches: int
    periods: tuple[PeriodUse, ...]
    failed_early: bool = False
    decisions: tuple[Decision, ...] = ()

    @property
    def device_s(self) -> float:
        """Device-seconds that replicas held."""
        return sum(item.device_s for item in self.periods)

    @property
    def energy_j(self) -> float:
        """Joules of devices while a replica held them."""
        return sum(item.energy.serving_j for item in self.periods)

    @property
    def idle_j(self) -> float:
        """Joules of devices that no replica held."""
        return sum(item.energy.idle_j for item in self.periods)


def deployment_of(plan: DeploymentPlan) -> tuple[tuple[str, int], ...]:
    """Shape names with their counts."""
    counts: dict[str, int] = {}
    for spec in plan.replicas:
        counts[spec.shape.name] = counts.get(spec.shape.name, 0) + 1
    return tuple(sorted(counts.items()))
