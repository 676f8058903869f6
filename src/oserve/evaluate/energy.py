"""The energy of a simulated fleet: of the devices that replicas hold, and of the others.

A replica holds its devices from the start of its process until its end: while it loads, stands by,
serves and drains. A device that no replica holds is idle; it draws less, but is not switched off.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from oserve.core import DeploymentPlan, Device, ReplicaShape
from oserve.perf.device import find_device
from oserve.perf.power import ReplicaWork
from oserve.perf.table import PerformanceSource
from oserve.sim.results import FleetResults, ReplicaTotals


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldDevices:
    """A replica's devices for ``seconds``, and what the replica did in them."""

    shape: ReplicaShape
    seconds: float
    work: ReplicaWork


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetEnergy:
    """Joules of devices held by replicas, and of idle ones."""

    serving_j: float
    idle_j: float

    @property
    def total_j(self) -> float:
        return self.serving_j + self.idle_j


def work_of(totals: ReplicaTotals, before: ReplicaTotals | None = None) -> ReplicaWork:
    """The work that a simulated replica counted, since ``before`` if it is given."""
    return ReplicaWork(
        busy_s=totals.busy_s - (before.busy_s if before else 0.0),
        prompt_tokens=totals.prompt_tokens - (before.prompt_tokens if before else 0),
        generated_tokens=totals.generated_tokens - (before.generated_tokens if before else 0),
        steps=totals.steps - (before.steps if before else 0),
    )


def fleet_energy(
    source: PerformanceSource,
    held: Iterable[HeldDevices],
    devices: Sequence[Device],
    seconds: float,
) -> FleetEnergy:
    """Joules of ``devices`` over ``seconds`` in which replicas held some of them."""
    serving_j = 0.0
    idle_s: dict[str, float] = defaultdict(float)
    for device in devices:
        idle_s[device.kind] += seconds
    for item in held:
        serving_j += item.seconds * source.power_w(item.shape, item.work, item.seconds)
        idle_s[item.shape.device_kind] -= item.seconds * item.shape.device_count
    idle_j = sum(
        find_device(kind).power.idle_w * max(0.0, left_s) for kind, left_s in idle_s.items()
    )
    return FleetEnergy(serving_j=serving_j, idle_j=idle_j)


def static_energy(
    source: PerformanceSource,
    plan: DeploymentPlan,
    results: FleetResults,
    devices: Sequence[Device],
    seconds: float,
) -> FleetEnergy:
    """Joules of a run in which the plan's replicas held their devices from 0 to ``seconds``."""
    totals = dict(zip(results.replica_names, results.totals, strict=True))
    held = [
        HeldDevices(shape=spec.shape, seconds=seconds, work=work_of(totals[spec.id]))
        for spec in plan.replicas
    ]
    return fleet_energy(source, held, devices, seconds)
