"""What is known of each replica: its state, changed as its task reports, and its failed starts."""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Protocol, TypedDict, Unpack

from oserve.core import (
    Clock,
    Endpoint,
    EngineWork,
    ReplicaPhase,
    ReplicaSpec,
    ReplicaState,
    StartFailures,
)

_log = logging.getLogger("oserve.engines")

_MAX_REMEMBERED = 256
# A replica that leaves does not come back.
_NEXT = {
    ReplicaPhase.DRAINING: {ReplicaPhase.HUNG, ReplicaPhase.GONE},
    ReplicaPhase.HUNG: {ReplicaPhase.GONE},
}


class StateChange(TypedDict, total=False):
    """Fields of ``ReplicaState`` that a task reports."""

    phase: ReplicaPhase
    since_s: float
    pid: int
    max_model_len: int
    running: int
    waiting: int
    kv_cache_usage: float
    work: EngineWork | None
    silent_s: float
    patience_s: float
    detail: str


class StateReport(Protocol):
    """Takes up what a replica's task has seen."""

    def __call__(self, **changes: Unpack[StateChange]) -> None: ...


class ReplicaStates(Mapping[str, ReplicaState]):
    """The newest state of each replica, by id, newest start last; gone ones up to a limit.

    ``on_change`` is called at once with each state whose phase changed.
    """

    def __init__(self, clock: Clock, on_change: Callable[[ReplicaState], None]) -> None:
        self._clock = clock
        self._on_change = on_change
        self._states: dict[str, ReplicaState] = {}
        self.failures: dict[str, StartFailures] = {}

    def __getitem__(self, replica: str) -> ReplicaState:
        return self._states[replica]

    def __iter__(self) -> Iterator[str]:
        return iter(self._states)

    def __len__(self) -> int:
        return len(self._states)

    def start(self, spec: ReplicaSpec, endpoint: Endpoint) -> None:
        """Begin the state of a replica that loads, or is taken over."""
        failures = self.failures.get(spec.id)
        if failures is not None and failures.spec != spec:
            del self.failures[spec.id]
        now_s = self._clock.now()
        self._states.pop(spec.id, None)  # so that the newest come last
        self._states[spec.id] = ReplicaState(
            spec=spec,
            phase=ReplicaPhase.LOADING,
            endpoint=endpoint,
            since_s=now_s,
            started_s=now_s,
        )
        gone = [name for name, one in self._states.items() if one.phase is ReplicaPhase.GONE]
        for name in gone[: max(0, len(gone) - _MAX_REMEMBERED)]:
            del self._states[name]
            self.failures.pop(name, None)

    def report(self, replica: str, **changes: Unpack[StateChange]) -> None:
        """Change the state of a replica; a phase that cannot follow its present one is ignored."""
        state = self._states[replica]
        phase = changes.get("phase", state.phase)
        if phase is state.phase or phase not in _NEXT.get(state.phase, ReplicaPhase):
            kept: StateChange = {**changes, "phase": state.phase}
            self._states[replica] = replace(state, **kept)
            return
        fresh: StateChange = {"since_s": self._clock.now(), "detail": "", **changes}
        state = self._states[replica] = replace(state, **fresh)
        if phase is ReplicaPhase.HUNG:
            _log.warning(
                "replica %s %s; its requests continue on other replicas", replica, state.detail
            )
        self._on_change(state)

    def stable(self, replica: str) -> None:
        """Forget the failures of a replica that has served for a good while."""
        self.failures.pop(replica, None)

    def end(self, replica: str, reason: str | None, *, counts: bool = True) -> None:
        """The last process of a replica has gone; ``reason`` where it ended unexpectedly.

        ``counts``: as a failure of the replica, and not of its node.
        """
        if reason is not None:
            _log.warning("replica %s %s", replica, reason)
        if reason is not None and counts:
            before = self.failures.get(replica)
            self.failures[replica] = StartFailures(
                spec=self._states[replica].spec,
                count=before.count + 1 if before is not None else 1,
                last_s=self._clock.now(),
                reason=reason,
            )
        self.report(
            replica,
            phase=ReplicaPhase.GONE,
            detail=reason or "",
            running=0,
            waiting=0,
            silent_s=0.0,
            pid=0,
        )
