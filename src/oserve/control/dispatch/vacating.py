"""Vacated replicas: their deadlines, and the times of their next checks.

Requests that are nearly done stay. The others leave as soon as another replica has room, and at
the latest at the deadline.
"""

from collections.abc import Iterable, Set
from dataclasses import dataclass, field

from oserve.control.dispatch.state import ReplicaStart
from oserve.control.dispatch.table import RoutingTable, TableReplica
from oserve.core import ReplicaPhase

_CHECK_S = 0.5
NEVER_S = float("inf")


@dataclass(slots=True)
class _Vacancy:
    """``asked``: requests told to leave in this check, which may be ``partial``."""

    deadline_s: float
    check_s: float
    asked: set[int] = field(default_factory=set)
    partial: bool = False


class Vacating:
    """The vacated replicas; a draining replica is vacated after ``drain_limit_s``."""

    def __init__(self, drain_limit_s: float | None) -> None:
        self._drain_limit_s = drain_limit_s
        self._draining: dict[ReplicaStart, float] = {}
        self._vacancies: dict[ReplicaStart, _Vacancy] = {}

    def __contains__(self, replica: TableReplica) -> bool:
        return (replica.id, replica.started_s) in self._vacancies

    def follow(self, table: RoutingTable, now_s: float) -> None:
        """Drop replicas that stopped; note those that began to drain."""
        present = {(replica.id, replica.started_s): replica for replica in table.replicas}
        self._vacancies = {key: item for key, item in self._vacancies.items() if key in present}
        self._draining = {key: at for key, at in self._draining.items() if key in present}
        if self._drain_limit_s is None:
            return
        for key, replica in present.items():
            if replica.phase is ReplicaPhase.DRAINING and key not in self._draining:
                self._draining[key] = now_s + self._drain_limit_s

    def begin(self, start: ReplicaStart, within_s: float, now_s: float) -> None:
        """Vacate a replica within so many seconds. Idempotent."""
        deadline_s = now_s + max(0.0, within_s)
        vacancy = self._vacancies.get(start)
        if vacancy is None or deadline_s < vacancy.deadline_s:
            self._vacancies[start] = _Vacancy(deadline_s, now_s)

    def due(self, now_s: float) -> list[ReplicaStart]:
        """Replicas whose requests must be checked now."""
        for start, at_s in self._draining.items():
            if at_s <= now_s:
                self._draining[start] = NEVER_S
                self.begin(start, 0.0, now_s)
        return [start for start, item in self._vacancies.items() if item.check_s <= now_s]

    def left_s(self, start: ReplicaStart, now_s: float) -> float:
        """Seconds until the deadline, when all requests that can migrate leave; at least 0."""
        vacancy = self._vacancies.get(start)
        return max(0.0, vacancy.deadline_s - now_s) if vacancy is not None else 0.0

    def asked(self, start: ReplicaStart) -> Set[int]:
        """Requests that this check has told to leave."""
        vacancy = self._vacancies.get(start)
        return vacancy.asked if vacancy is not None else frozenset()

    def ask(self, start: ReplicaStart, numbers: Iterable[int]) -> None:
        """Record requests that were told to leave; the next check may repeat that."""
        vacancy = self._vacancies.get(start)
        if vacancy is not None:
            vacancy.asked.update(numbers)

    def checked(self, start: ReplicaStart, now_s: float) -> None:
        """Begin a check; schedule the next one, at the latest at the deadline."""
        left_s = self.left_s(start, now_s)
        self._check_at(start, now_s + (min(_CHECK_S, left_s) if left_s > 0.0 else _CHECK_S))
        vacancy = self._vacancies.get(start)
        if vacancy is not None:
            if not vacancy.partial:
                vacancy.asked.clear()
            vacancy.partial = False

    def go_on(self, start: ReplicaStart, now_s: float) -> None:
        """Continue the check with the other requests after other events had their turn."""
        self._check_at(start, now_s)
        vacancy = self._vacancies.get(start)
        if vacancy is not None:
            vacancy.partial = True

    def stop_checks(self, start: ReplicaStart) -> None:
        """Stop the checks, since the replica has no requests."""
        self._check_at(start, NEVER_S)

    def _check_at(self, start: ReplicaStart, at_s: float) -> None:
        vacancy = self._vacancies.get(start)
        if vacancy is not None:
            vacancy.check_s = at_s

    @property
    def next_s(self) -> float:
        """The time of the next check."""
        checks = [item.check_s for item in self._vacancies.values()]
        return min((*checks, *self._draining.values()), default=NEVER_S)
