"""Replicas that are to give up their running requests: until when, and when to look again.

Requests that are nearly done stay. The others leave as soon as another replica has room for them,
and in any case when the time is up.
"""

from collections.abc import Iterable, Set
from dataclasses import dataclass, field

from oserve.control.dispatch.state import ReplicaStart
from oserve.control.dispatch.table import RoutingTable, TableReplica
from oserve.core import ReplicaPhase

_LOOK_S = 0.5
NEVER_S = float("inf")


@dataclass(slots=True)
class _Vacancy:
    """``asked``: requests that were told to leave, at this look or, if it ``goes_on``, before."""

    deadline_s: float
    look_s: float
    asked: set[int] = field(default_factory=set)
    goes_on: bool = False


class Vacating:
    """The orders to vacate replicas; one that drains is vacated after ``drain_limit_s``."""

    def __init__(self, drain_limit_s: float | None) -> None:
        self._drain_limit_s = drain_limit_s
        self._draining: dict[ReplicaStart, float] = {}
        self._vacancies: dict[ReplicaStart, _Vacancy] = {}

    def __contains__(self, replica: TableReplica) -> bool:
        return (replica.id, replica.started_s) in self._vacancies

    def follow(self, table: RoutingTable, now_s: float) -> None:
        """Forget replicas that are gone; note those that began to drain."""
        present = {(replica.id, replica.started_s): replica for replica in table.replicas}
        self._vacancies = {key: item for key, item in self._vacancies.items() if key in present}
        self._draining = {key: at for key, at in self._draining.items() if key in present}
        if self._drain_limit_s is None:
            return
        for key, replica in present.items():
            if replica.phase is ReplicaPhase.DRAINING and key not in self._draining:
                self._draining[key] = now_s + self._drain_limit_s

    def begin(self, start: ReplicaStart, within_s: float, now_s: float) -> None:
        """Have a replica vacated within so many seconds; asking again is harmless."""
        deadline_s = now_s + max(0.0, within_s)
        vacancy = self._vacancies.get(start)
        if vacancy is None or deadline_s < vacancy.deadline_s:
            self._vacancies[start] = _Vacancy(deadline_s, now_s)

    def due(self, now_s: float) -> list[ReplicaStart]:
        """Replicas whose requests are to be looked at now."""
        for start, at_s in self._draining.items():
            if at_s <= now_s:
                self._draining[start] = NEVER_S
                self.begin(start, 0.0, now_s)
        return [start for start, item in self._vacancies.items() if item.look_s <= now_s]

    def left_s(self, start: ReplicaStart, now_s: float) -> float:
        """Seconds until all that can move must leave; 0 when the time is up."""
        vacancy = self._vacancies.get(start)
        return max(0.0, vacancy.deadline_s - now_s) if vacancy is not None else 0.0

    def asked(self, start: ReplicaStart) -> Set[int]:
        """Requests that have been told to leave, of those that are looked at now."""
        vacancy = self._vacancies.get(start)
        return vacancy.asked if vacancy is not None else frozenset()

    def ask(self, start: ReplicaStart, numbers: Iterable[int]) -> None:
        """These have been told to leave, and are not told again before the next look."""
        vacancy = self._vacancies.get(start)
        if vacancy is not None:
            vacancy.asked.update(numbers)

    def looked(self, start: ReplicaStart, now_s: float) -> None:
        """Look again at an interval, or when the time is up."""
        left_s = self.left_s(start, now_s)
        self._look_at(start, now_s + (min(_LOOK_S, left_s) if left_s > 0.0 else _LOOK_S))
        vacancy = self._vacancies.get(start)
        if vacancy is not None:
            if not vacancy.goes_on:
                vacancy.asked.clear()
            vacancy.goes_on = False

    def go_on(self, start: ReplicaStart, now_s: float) -> None:
        """Look at those who were not told to leave, as soon as other work has had its turn."""
        self._look_at(start, now_s)
        vacancy = self._vacancies.get(start)
        if vacancy is not None:
            vacancy.goes_on = True

    def look_no_more(self, start: ReplicaStart) -> None:
        """No request is left there."""
        self._look_at(start, NEVER_S)

    def _look_at(self, start: ReplicaStart, at_s: float) -> None:
        vacancy = self._vacancies.get(start)
        if vacancy is not None:
            vacancy.look_s = at_s

    @property
    def next_s(self) -> float:
        """When something is due next."""
        looks = [item.look_s for item in self._vacancies.values()]
        return min((*looks, *self._draining.values()), default=NEVER_S)
