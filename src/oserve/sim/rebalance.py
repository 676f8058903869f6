"""Llumnix's rebalancing: running requests move from full replicas to free ones."""

from typing import Protocol

from oserve.core import ReplicaPhase
from oserve.sim.types import Ints, Rebalance, ReplicaObservation


class Migrations(Protocol):
    """The interface of the fleet for a round of rebalancing."""

    def replicas(self) -> tuple[ReplicaObservation, ...]: ...

    def running(self, name: str) -> Ints: ...

    def migrate(self, request: int, to: str) -> bool: ...


def rebalance(fleet: Migrations, wanted: Rebalance) -> None:
    """One round: the fullest replica sends to the freest, the second to the second, and so on."""
    ready = [item for item in fleet.replicas() if item.phase is ReplicaPhase.READY]
    full = sorted((i for i in ready if i.freeness < wanted.source_below), key=_freeness)
    free = sorted((i for i in ready if i.freeness > wanted.target_above), key=_freeness)
    for source, target in zip(full, reversed(free), strict=False):
        moved = 0
        for request in fleet.running(source.name).tolist():
            if moved == wanted.moves:
                break
            moved += fleet.migrate(request, target.name)


def _freeness(item: ReplicaObservation) -> float:
    return item.freeness
