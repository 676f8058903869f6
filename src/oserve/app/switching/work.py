"""The tasks of a wave on a cluster: standby engines, weights, routing, ends.

What ends a replica for good after the commit is the control loop, which drains whatever the plan in
force does not have; here it is only waited for.
"""

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from oserve.app.switching.drive import TaskFailedError
from oserve.app.switching.programme import Programme, Step
from oserve.control.cluster import Cluster
from oserve.core import (
    Clock,
    CommitReplicas,
    DeploymentPlan,
    DrainReplica,
    Endpoint,
    OServeError,
    ReplicaPhase,
    ReplicaState,
    StartReplica,
    StopReplica,
)
from oserve.engines.mover import Moved, MoveError
from oserve.switch.layout import Architecture, differences, shard_map
from oserve.switch.orders import RankOrder
from oserve.switch.transaction import Task

_POLL_S = 0.1
_CHECK_S = 50.0
# Requests sent just before a drain may not be counted yet.
_SETTLE_S = 3.0
_ABLE = {ReplicaPhase.STANDBY, ReplicaPhase.READY}
_ALIVE = {ReplicaPhase.STANDBY, ReplicaPhase.READY, ReplicaPhase.DRAINING}


_log = logging.getLogger("oserve.switch")


class Moving(Protocol):
    """See ``oserve.engines.mover.Mover``."""

    async def layouts(self, replica: str) -> list[dict[str, tuple[int, ...]]]: ...

    async def move(
        self,
        name: str,
        orders: Sequence[RankOrder],
        *,
        limit_s: float,
        progress: Callable[[int], None],
    ) -> Moved: ...

    async def check(self, name: str, orders: Sequence[RankOrder], *, limit_s: float) -> int: ...

    async def generate(self, replica: str, model: str, *, limit_s: float) -> None: ...

    async def surprise(self, replica: str, model: str, *, limit_s: float) -> float: ...

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkFacts:
    """``name``: of the switch. ``hold``: what the control loop is to leave alone from now on.

    ``route``: the plan is in force from now on, in all that routes and reconciles. ``progress``
    hears bytes. ``mover`` makes one for endpoints. ``max_perplexity_rise``: by what share a
    replica whose weights were made on the way may find a text less likely than its source does.
    """

    name: str
    programme: Programme
    architecture: Architecture
    cluster: Cluster
    clock: Clock
    model: str
    hold: Callable[[frozenset[str]], None]
    route: Callable[[DeploymentPlan], Awaitable[None]]
    progress: Callable[[int], None]
    mover: Callable[[Mapping[str, Endpoint]], Moving]
    transfer_limit_s: float
    max_perplexity_rise: float


class ClusterWork:
    """See ``drive.Work``."""

    def __init__(self, facts: WorkFacts) -> None:
        self._facts = facts
        self._step: Step | None = None
        self._moving: asyncio.Task[None] | None = None
        self._checking: asyncio.Task[None] | None = None
        self._moved_before = 0
        self._held: set[str] = set()

    def begin(self, step: Step) -> None:
        """The next wave."""
        self._step = step
        self._moving = self._checking = None
        self._hold({*step.wave.start, *step.wave.stop, *step.wave.release})

    async def over(self) -> None:
        """The wave has ended; the control loop has everything again."""
        for task in (self._moving, self._checking):
            if task is not None and not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        self._moved_before += 0 if self._step is None else self._step.transfer.traffic.moved_bytes
        self._step = None
        self._hold(set())

    async def do(self, task: Task, replica: str, *, late: bool) -> None:
        """One task; see ``drive.Work``."""
        match task:
            case Task.START:
                await self._start(replica)
            case Task.STOP:
                await self._stop(replica, late=late)
            case Task.FILL:
                await self._shared("_moving", self._move)
            case Task.CHECK:
                await self._shared("_checking", self._check)
            case Task.ROUTE:
                await self._route()
            case Task.RETIRE:
                await self._retire(replica, late=late)
            case Task.UNDO:
                await self._undo(replica)
            case Task.RESTORE:
                await self._restore(replica, late=late)
            case Task.RELEASE:
                raise TaskFailedError("engines cannot give up their cache alone", final=True)

    def _hold(self, names: set[str]) -> None:
        self._held = names
        self._facts.hold(frozenset(names))

    async def _state(self, replica: str) -> ReplicaState | None:
        return (await self._facts.cluster.observe()).replica(replica)

    # -- engines --------------------------------------------------------------------------------
    async def _start(self, replica: str) -> None:
        spec = self._facts.programme.spec(replica)
        state = await self._state(replica)
        if state is None:
            try:
                await self._facts.cluster.apply(StartReplica(spec=spec, standby=True))
            except ValueError as error:
                raise TaskFailedError(str(error)) from None
        while True:
            state = await self._state(replica)
            if state is None:
                failures = (await self._facts.cluster.observe()).failures.get(replica)
                raise TaskFailedError(failures.reason if failures else "it ended")
            if state.phase is ReplicaPhase.STANDBY:
                return
            await self._facts.clock.sleep(_POLL_S)

    async def _stop(self, replica: str, *, late: bool) -> None:
        """Drain, end, and wait until its devices are free."""
        cluster = self._facts.cluster
        began_s = self._facts.clock.now()
        await cluster.apply(DrainReplica(replica=replica))
        while (state := await self._state(replica)) is not None:
            idle = state.running + state.waiting == 0
            settled = self._facts.clock.now() - began_s >= _SETTLE_S
            if late or (idle and settled):
                await cluster.apply(StopReplica(replica=replica))
            await self._facts.clock.sleep(_POLL_S)

    async def _retire(self, replica: str, *, late: bool) -> None:
        while await self._state(replica) is not None:
            if late:
                await self._facts.cluster.apply(StopReplica(replica=replica))
            await self._facts.clock.sleep(_POLL_S)

    async def _undo(self, replica: str) -> None:
        await self._facts.cluster.apply(StopReplica(replica=replica))
        while await self._state(replica) is not None:
            await self._facts.clock.sleep(_POLL_S)

    async def _restore(self, replica: str, *, late: bool) -> None:
        """The control loop starts it: it is in the plan in force."""
        self._hold(self._held - {replica})
        while not late:
            state = await self._state(replica)
            if state is not None and state.phase is ReplicaPhase.READY:
                return
            await self._facts.clock.sleep(_POLL_S)

    async def _route(self) -> None:
        assert self._step is not None
        step = self._step
        observation = await self._facts.cluster.observe()
        able = tuple(
            name
            for name in step.wave.start
            if (state := observation.replica(name)) is not None and state.phase in _ABLE
        )
        # One that ended after its check is started from disk; then the old ones go as it comes.
        whole = len(able) == len(step.wave.start)
        await self._facts.cluster.apply(
            CommitReplicas(ready=able, drain=step.wave.retire if whole else ())
        )
        self._hold(set())
        await self._facts.route(step.plan)

    # -- weights --------------------------------------------------------------------------------
    async def _shared(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        """All replicas of a wave are filled, and checked, by one task; asked again, by another."""
        task: asyncio.Task[None] | None = getattr(self, name)
        if task is None or task.done():
            task = asyncio.ensure_future(work())
            setattr(self, name, task)
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            raise
        except MoveError as error:
            raise TaskFailedError(str(error), final=await self._hopeless()) from None

    async def _hopeless(self) -> bool:
        """Whether an engine that takes part has ended."""
        assert self._step is not None
        for replica in _replicas(self._step):
            state = await self._state(replica)
            if state is None or state.phase not in _ALIVE:
                return True
        return False

    async def _mover(self) -> Moving:
        assert self._step is not None
        places = {}
        for replica in _replicas(self._step):
            state = await self._state(replica)
            if state is None or state.phase not in _ALIVE:
                raise MoveError(f"{replica} has ended")
            places[replica] = state.endpoint
        return self._facts.mover(places)

    async def _move(self) -> None:
        assert self._step is not None
        step, facts = self._step, self._facts
        mover = await self._mover()
        try:
            await self._compare_layouts(mover, step)
            moved = await mover.move(
                f"{facts.name}.{facts.programme.steps.index(step)}",
                step.orders,
                limit_s=step.limit_s(facts.transfer_limit_s),
                progress=lambda size: facts.progress(self._moved_before + size),
            )
            _log.info(
                "switch %s: %.0f MB moved in %.2f s, taken up in %.2f s",
                facts.name,
                moved.size_bytes / 1e6,
                moved.seconds,
                moved.take_up_s,
            )
        finally:
            await mover.close()

    async def _compare_layouts(self, mover: Moving, step: Step) -> None:
        for replica in _replicas(step):
            layout = self._facts.programme.placed[replica].layout
            for rank, live in enumerate(await mover.layouts(replica)):
                try:
                    expected = shard_map(self._facts.architecture, layout, rank)
                except OServeError as error:
                    raise TaskFailedError(str(error), final=True) from None
                found = differences(expected, live)
                if found:
                    raise TaskFailedError(
                        f"{replica} rank {rank} holds its weights otherwise than expected: "
                        + "; ".join(found[:3]),
                        final=True,
                    )

    async def _check(self) -> None:
        """Checksums at both ends, and one generation by each new replica."""
        assert self._step is not None
        step = self._step
        mover = await self._mover()
        try:
            await mover.check(self._facts.name, step.orders, limit_s=_CHECK_S)
            model = self._facts.model
            await asyncio.gather(
                *(mover.generate(name, model, limit_s=_CHECK_S) for name in step.wave.start)
            )
            for name in dict.fromkeys(one.replica for one in step.transfer.conversions):
                await self._compare_quality(mover, step, name)
        finally:
            await mover.close()

    async def _compare_quality(self, mover: Moving, step: Step, made: str) -> None:
        """Whether quantising on the way cost more than it may."""
        facts = self._facts
        numbers = {
            peer for order in step.orders if order.replica == made for peer in order.receives
        }
        source = next(
            (
                step.orders[number].replica
                for number in sorted(numbers)
                if step.orders[number].replica != made
            ),
            None,
        )
        if source is None:
            return
        before, after = await asyncio.gather(
            mover.surprise(source, facts.model, limit_s=_CHECK_S),
            mover.surprise(made, facts.model, limit_s=_CHECK_S),
        )
        rise = math.expm1(after - before)
        _log.info(
            "switch %s: perplexity of %s is %+.2f %% of that of %s",
            facts.name,
            made,
            100 * rise,
            source,
        )
        if not rise <= facts.max_perplexity_rise:
            raise TaskFailedError(
                f"the weights of {made}, made on the way, raise perplexity by {100 * rise:.1f} %; "
                f"switch.max_perplexity_rise allows {100 * facts.max_perplexity_rise:.1f} %",
                final=True,
            )


def _replicas(step: Step) -> list[str]:
    """All that take part in a wave's transfer."""
    found: dict[str, Any] = dict.fromkeys(order.replica for order in step.orders)
    return list(found)
