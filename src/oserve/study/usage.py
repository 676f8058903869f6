"""What a run's replicas used, by period: devices, joules, and memory of the KV cache.

Periods end at snapshots of the fleet's counters. Energy follows from the work within a period, so
shorter periods give truer figures.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from oserve.core import Device
from oserve.evaluate.energy import FleetEnergy, HeldDevices, fleet_energy, work_of
from oserve.perf.table import PerformanceSource
from oserve.sim.cluster import Life
from oserve.sim.results import ReplicaTotals

# A replica that lived for less of a period says nothing about balance.
_LEAST_SHARE = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The counters of all replicas so far, in order of their starts."""

    at_s: float
    totals: tuple[ReplicaTotals, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaUse:
    """One replica in a period: the seconds that it lived, mean and peak used share of KV cache."""

    name: str
    seconds: float
    kv_mean: float
    kv_peak: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PeriodUse:
    """Device-seconds held by replicas, and joules, from ``start_s`` to ``end_s``."""

    start_s: float
    end_s: float
    device_s: float
    energy: FleetEnergy
    replicas: tuple[ReplicaUse, ...]

    @property
    def kv_mean(self) -> float:
        """The used share of the KV cache, over replicas and time."""
        lived_s = sum(item.seconds for item in self.replicas)
        used_s = sum(item.kv_mean * item.seconds for item in self.replicas)
        return used_s / lived_s if lived_s > 0 else 0.0

    @property
    def kv_peak(self) -> float:
        """The largest used share of any replica at any time."""
        return max((item.kv_peak for item in self.replicas), default=0.0)

    @property
    def kv_imbalance(self) -> float:
        """The largest mean use of a replica over the mean of all; 1 is balanced."""
        least_s = _LEAST_SHARE * (self.end_s - self.start_s)
        means = [item.kv_mean for item in self.replicas if item.seconds >= least_s]
        total = sum(means)
        return max(means) * len(means) / total if total > 0 else 1.0


def merged(periods: Sequence[PeriodUse]) -> PeriodUse:
    """Consecutive periods as one; a replica that lived in several counts once."""
    names = dict.fromkeys(item.name for period in periods for item in period.replicas)
    replicas = []
    for name in names:
        parts = [item for period in periods for item in period.replicas if item.name == name]
        seconds = sum(item.seconds for item in parts)
        replicas.append(
            ReplicaUse(
                name=name,
                seconds=seconds,
                kv_mean=sum(item.kv_mean * item.seconds for item in parts) / seconds,
                kv_peak=max(item.kv_peak for item in parts),
            )
        )
    return PeriodUse(
        start_s=periods[0].start_s,
        end_s=periods[-1].end_s,
        device_s=sum(item.device_s for item in periods),
        energy=FleetEnergy(
            serving_j=sum(item.energy.serving_j for item in periods),
            idle_j=sum(item.energy.idle_j for item in periods),
        ),
        replicas=tuple(replicas),
    )


def period_uses(
    source: PerformanceSource,
    devices: Sequence[Device],
    lives: Sequence[Life],
    snapshots: Sequence[Snapshot],
) -> tuple[PeriodUse, ...]:
    """A period up to each snapshot, the first from 0 s; ``lives`` in order of their starts."""
    found, before = [], Snapshot(at_s=0.0, totals=())
    for after in snapshots:
        found.append(_period(source, devices, lives, before, after))
        before = after
    return tuple(found)


def _period(
    source: PerformanceSource,
    devices: Sequence[Device],
    lives: Sequence[Life],
    before: Snapshot,
    after: Snapshot,
) -> PeriodUse:
    held, replicas = [], []
    for life, seconds, old, new in _lived(lives, before, after):
        shape = life.spec.shape
        held.append(HeldDevices(shape=shape, seconds=seconds, work=work_of(new, old)))
        room_s = new.kv_blocks * seconds
        used_s = new.kv_block_s - (old.kv_block_s if old else 0.0)
        replicas.append(
            ReplicaUse(
                name=life.spec.id,
                seconds=seconds,
                kv_mean=used_s / room_s if room_s > 0 else 0.0,
                kv_peak=new.kv_peak_blocks / new.kv_blocks if new.kv_blocks else 0.0,
            )
        )
    return PeriodUse(
        start_s=before.at_s,
        end_s=after.at_s,
        device_s=sum(item.seconds * item.shape.device_count for item in held),
        energy=fleet_energy(source, held, devices, after.at_s - before.at_s),
        replicas=tuple(replicas),
    )


def _lived(
    lives: Sequence[Life], before: Snapshot, after: Snapshot
) -> Iterator[tuple[Life, float, ReplicaTotals | None, ReplicaTotals]]:
    """Replicas that lived in a period: seconds, counters before (if it had started) and after."""
    for at, (life, new) in enumerate(zip(lives, after.totals, strict=False)):
        end_s = after.at_s if life.end_s is None else min(after.at_s, life.end_s)
        seconds = end_s - max(before.at_s, life.start_s)
        if seconds > 0:
            yield life, seconds, before.totals[at] if at < len(before.totals) else None, new
