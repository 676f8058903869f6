"""The tasks of a wave on a cluster: start standbys, move weights, route, stop replicas.

They are the same on engines and on simulated replicas: the cluster API starts and stops replicas,
and ``WaveWeights`` moves the weights. After the commit the control loop drains and stops replicas
outside the plan in force; the tasks only wait for that.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass

from oserve.control.cluster import Cluster
from oserve.core import (
    Action,
    Clock,
    CommitReplicas,
    DeploymentPlan,
    DrainReplica,
    Observation,
    ReplicaPhase,
    ReplicaState,
    StartReplica,
    StopReplica,
)
from oserve.switch.programme import ProgrammeStep, SwitchProgramme
from oserve.switch.transaction import Task
from oserve.switching.weights import MoveError, WaveWeights

# Requests sent just before a drain may not be counted yet.
_SETTLE_S = 3.0
# A node may have died just before the commit, which is noticed when it has been silent for 5 s. So
# long the old replicas stay, to serve again if it has.
_NOTICE_S = 6.0
_ABLE = {ReplicaPhase.STANDBY, ReplicaPhase.READY}
_ALIVE = {ReplicaPhase.STANDBY, ReplicaPhase.READY, ReplicaPhase.DRAINING}


class TaskFailedError(Exception):
    """A task failed; ``final``: a retry would not help."""

    def __init__(self, reason: str, *, final: bool = False) -> None:
        super().__init__(reason)
        self.final = final


@dataclass(frozen=True, slots=True, kw_only=True)
class WaveTaskFacts:
    """``hold`` tells the control loop which replicas the switch controls from now on.

    ``route`` puts a plan in force, for gateways and the control loop. ``progress`` gets the bytes
    that have arrived since the switch began. The tasks poll the cluster every ``poll_s``.
    """

    programme: SwitchProgramme
    cluster: Cluster
    clock: Clock
    weights: WaveWeights
    hold: Callable[[frozenset[str]], None]
    route: Callable[[DeploymentPlan], Awaitable[None]]
    progress: Callable[[int], None]
    poll_s: float = 0.1


class WaveTasks:
    """The tasks of one wave; each may be requested again. See ``transaction.Task``.

    ``returned``: why the plan before the wave is in force again after the commit, or "".
    """

    def __init__(self, facts: WaveTaskFacts, step: ProgrammeStep, moved_before: int) -> None:
        self._facts = facts
        self._step = step
        self._moved_before = moved_before
        self.returned = ""
        self._committed_s = float("-inf")
        self._filling = _Shared(lambda: self._watched(self._fill))
        self._checking = _Shared(lambda: self._watched(self._check))
        wave = step.wave
        self._hold(frozenset((*wave.start, *wave.stop, *wave.release)))

    async def close(self) -> None:
        """Cancel what still runs; return all replicas to the control loop."""
        await self._filling.cancel()
        await self._checking.cancel()
        self._hold(frozenset())

    async def run(self, task: Task, replica: str, *, late: bool) -> None:
        """Run a task to its end. Raises TaskFailedError."""
        match task:
            case Task.START:
                await self._start(replica)
            case Task.STOP:
                await self._stop(replica, late=late)
            case Task.FILL:
                await self._shared(self._filling)
            case Task.CHECK:
                await self._shared(self._checking)
            case Task.ROUTE:
                await self._route()
            case Task.RETIRE:
                await self._retire(replica, late=late)
            case Task.UNDO:
                await self._undo(replica)
            case Task.RESTORE:
                await self._restore(replica, late=late)
            case Task.RELEASE:
                await self._release(replica, late=late)

    def _hold(self, names: frozenset[str]) -> None:
        self._held = names
        self._facts.hold(names)

    async def _state(self, replica: str) -> ReplicaState | None:
        return (await self._facts.cluster.observe()).replica(replica)

    async def _apply(self, action: Action) -> None:
        try:
            await self._facts.cluster.apply(action)
        except (ValueError, OSError) as error:
            raise TaskFailedError(str(error)) from None

    async def _poll(self) -> None:
        await self._facts.clock.sleep(self._facts.poll_s)

    # -- replicas -------------------------------------------------------------------------------
    async def _start(self, replica: str) -> None:
        spec = self._facts.programme.spec(replica)
        if await self._state(replica) is None:
            await self._apply(StartReplica(spec=spec, standby=True))
        while True:
            observation = await self._facts.cluster.observe()
            state = observation.replica(replica)
            if state is None:
                failures = observation.failures.get(replica)
                raise TaskFailedError(
                    failures.reason if failures else self._end(observation, replica)
                )
            if state.phase is ReplicaPhase.STANDBY:
                return
            await self._poll()

    async def _drain(self, replica: str, *, late: bool) -> None:
        """Wait until a replica has drained; return at once if it stopped or the task is late."""
        began_s = self._facts.clock.now()
        while not late and (state := await self._state(replica)) is not None:
            if state.phase is ReplicaPhase.READY:
                await self._apply(DrainReplica(replica=replica))
            elif state.phase is not ReplicaPhase.DRAINING:
                return
            idle = state.running + state.waiting == 0
            if idle and self._facts.clock.now() - began_s >= _SETTLE_S:
                return
            await self._poll()

    async def _stop(self, replica: str, *, late: bool) -> None:
        """Drain, stop, and wait until the devices are free."""
        await self._drain(replica, late=late)
        await self._undo(replica)

    async def _release(self, replica: str, *, late: bool) -> None:
        await self._drain(replica, late=late)
        if await self._state(replica) is None:
            raise TaskFailedError(f"{replica} has ended", final=True)
        try:
            await self._facts.weights.release(replica)
        except MoveError as error:
            raise TaskFailedError(str(error)) from None

    async def _retire(self, replica: str, *, late: bool) -> None:
        while await self._state(replica) is not None:
            if await self._has_returned():
                return
            if self._held and self._facts.clock.now() - self._committed_s >= _NOTICE_S:
                self._hold(frozenset())
            if late:
                await self._apply(StopReplica(replica=replica))
            await self._poll()

    async def _has_returned(self) -> bool:
        """Return to the plan before the wave once the node of a new replica is lost.

        The old replicas that still drain serve again: the new one cannot start until the node is
        back.
        """
        observation = await self._facts.cluster.observe()
        wave = self._step.wave
        lost = next((name for name in wave.start if self._lost_node(observation, name)), None)
        if self.returned or lost is None:
            return bool(self.returned)
        states = {state.spec.id: state for state in observation.replicas}
        able = tuple(name for name in wave.retire if name in states and _serves(states[name]))
        self.returned = f"{lost}: node {self._lost_node(observation, lost)} is lost"
        try:
            await self._apply(CommitReplicas(ready=able, drain=()))
        except TaskFailedError:
            self.returned = ""  # one of them was stopped meanwhile: look again
            return False
        await self._facts.route(self._facts.programme.before_step(self._step.number))
        return True

    async def _undo(self, replica: str) -> None:
        while await self._state(replica) is not None:
            await self._apply(StopReplica(replica=replica))
            await self._poll()

    async def _restore(self, replica: str, *, late: bool) -> None:
        """Wait for the control loop to start the replica, since the plan in force has it."""
        self._hold(self._held - {replica})
        needed = set(self._facts.programme.spec(replica).devices)
        while not late:
            observation = await self._facts.cluster.observe()
            state = observation.replica(replica)
            if state is not None and state.phase is ReplicaPhase.READY:
                return
            if not needed <= {device.id for device in observation.devices}:
                return  # its node is lost, and nothing starts there before it is back
            await self._poll()

    async def _route(self) -> None:
        step = self._step
        observation = await self._facts.cluster.observe()
        able = tuple(
            name
            for name in step.wave.start
            if (state := observation.replica(name)) is not None and state.phase in _ABLE
        )
        # A replica that ended after its check is started from disk. Then the control loop retires
        # the old replicas as the new one comes up.
        whole = len(able) == len(step.wave.start)
        await self._apply(CommitReplicas(ready=able, drain=step.wave.retire if whole else ()))
        observation = await self._facts.cluster.observe()
        for name in able:
            state = observation.replica(name)
            if state is not None and state.phase is ReplicaPhase.STANDBY:
                # The control loop would stop a replica on standby that no switch holds.
                raise TaskFailedError(f"{name} is still on standby")
        across = len(set(self._facts.programme.nodes.values())) > 1
        self._hold(frozenset(step.wave.retire if across and whole else ()))
        self._committed_s = self._facts.clock.now()
        await self._facts.route(step.plan)

    # -- weights --------------------------------------------------------------------------------
    async def _fill(self) -> None:
        await self._facts.weights.fill(
            self._step, progress=lambda size: self._facts.progress(self._moved_before + size)
        )

    async def _check(self) -> None:
        await self._facts.weights.check(self._step)

    async def _watched(self, work: Callable[[], Coroutine[None, None, None]]) -> None:
        """Do work until a participant ends: ranks wait for one on a lost node until a deadline."""
        working = asyncio.ensure_future(work())
        watching = asyncio.ensure_future(self._participant_end())
        try:
            await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise TaskFailedError(await watching, final=True)
            await working
        finally:
            working.cancel()
            watching.cancel()
            await asyncio.gather(working, watching, return_exceptions=True)

    async def _participant_end(self) -> str:
        """Wait until a participating replica has ended; returns which, and why."""
        while True:
            observation = await self._facts.cluster.observe()
            for name in self._step.participants:
                state = observation.replica(name)
                if state is None or state.phase not in _ALIVE:
                    return f"{name}: {self._end(observation, name)}"
            await self._poll()

    def _end(self, observation: Observation, replica: str) -> str:
        """Why a replica has ended."""
        node = self._lost_node(observation, replica)
        if node:
            return f"node {node} is lost"
        states = (state for state in observation.replicas if state.spec.id == replica)
        return next((state.detail for state in states if state.detail), "it has ended")

    def _lost_node(self, observation: Observation, replica: str) -> str:
        """The node of a replica whose devices are not there, or ""."""
        programme = self._facts.programme
        there = {device.id for device in observation.devices}
        devices = programme.spec(replica).devices
        gone = (programme.nodes.get(device, "") for device in devices if device not in there)
        return next(gone, "")

    async def _shared(self, work: "_Shared") -> None:
        try:
            await work.wait()
        except MoveError as error:
            raise TaskFailedError(str(error), final=await self._is_final()) from None

    async def _is_final(self) -> bool:
        """Whether a participating replica has ended."""
        observation = await self._facts.cluster.observe()
        states = [observation.replica(name) for name in self._step.participants]
        return any(state is None or state.phase not in _ALIVE for state in states)


def _serves(state: ReplicaState) -> bool:
    return state.phase in {ReplicaPhase.READY, ReplicaPhase.DRAINING}


class _Shared:
    """Work that all replicas of a wave wait for. A wait after its end starts it again."""

    def __init__(self, work: Callable[[], Awaitable[None]]) -> None:
        self._work = work
        self._task: asyncio.Future[None] | None = None

    async def wait(self) -> None:
        """Wait for the work; the cancellation of one waiter cancels it for all."""
        if self._task is None or self._task.done():
            self._task = asyncio.ensure_future(self._work())
        try:
            await asyncio.shield(self._task)
        except asyncio.CancelledError:
            await self.cancel()
            raise

    async def cancel(self) -> None:
        """Cancel the work if it runs."""
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
