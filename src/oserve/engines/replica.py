"""The task of one replica, from the start of its engine to its end: it starts, probes and ends it.

The task reports what it sees through a callback, and returns why the engine ended. The cluster and
the control loop decide what follows.
"""

import asyncio
import signal
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from oserve.control.progress import ProgressSample, ProgressTracker
from oserve.core import Clock, OServeError, ReplicaPhase
from oserve.engines.held_process import NodeLostError
from oserve.engines.parts_process import PartsProcess
from oserve.engines.probe import EngineLoad, ProbeReply, ServedModel
from oserve.engines.replica_states import StateReport
from oserve.engines.settings import EngineSettings
from oserve.engines.watched import WatchedProcess

_LOADING_POLL_S = 0.1
# Any token will do; a whole chunk makes the engine allocate the memory of a full step.
_WARM_UP_TOKEN = 5
_MAX_WARM_UP_PROMPT = 8192
# A standby engine shares its cores with engines that serve.
_MAX_STANDBY_PROMPT = 32
_WARM_UP_TOKENS = 2
# Time for gateways to hear that it gets no more requests and to resume its streams elsewhere.
_LEAVE_S = 0.3


class Prober(Protocol):
    """See ``oserve.engines.probe.Probe``."""

    async def healthy(self) -> bool: ...

    async def models(self) -> tuple[ServedModel, ...] | None: ...

    async def load(self) -> EngineLoad | None: ...

    async def alive(self) -> bool | None: ...

    async def complete(
        self, model: str, prompt: str | list[int], max_tokens: int, timeout_s: float
    ) -> bool: ...

    async def ask(
        self, method: str, path: str, body: Mapping[str, object] | None = None
    ) -> ProbeReply: ...

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class UnexpectedExit:
    """Why a replica ended, or must be ended, though it was not told to stop.

    ``hangs``: it does not react, so that asking it to end is useless. ``lost``: so is its node,
    where it may still run.
    """

    reason: str
    hangs: bool = False
    lost: bool = False


@dataclass(kw_only=True)
class ReplicaTask:
    """What both kinds of replica need. Set ``stop`` to end it; ``run`` then returns ``None``.

    ``report`` takes the fields of ``ReplicaState`` that changed; ``stable`` is called whenever the
    replica has been ready without a break for ``settings.stable_s``. ``standby``: once it can
    serve, the replica is not ready but waits for its weights.
    """

    clock: Clock
    settings: EngineSettings
    probe: Prober
    report: StateReport
    stable: Callable[[], None]
    standby: bool = False
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> UnexpectedExit | None:
        """Run until told to stop (``None``), or until the replica ends by itself."""
        raise NotImplementedError

    async def _measure(self) -> EngineLoad | None:
        load = await self.probe.load()
        if load is not None:
            self.report(
                running=load.running,
                waiting=load.waiting,
                kv_cache_usage=load.kv_cache_usage,
                work=load.work,
            )
        return load


@dataclass(kw_only=True)
class VllmReplica(ReplicaTask):
    """A vLLM engine: ``start`` starts its processes, here or on another node.

    ``chunk_tokens``: tokens that one step may compute. ``was_ready``: it served before this task
    began. ``step_s``: seconds that a whole chunk is known to take; ``learned`` receives seconds per
    prompt token.
    """

    start: Callable[[], Awaitable[WatchedProcess]]
    model: str
    chunk_tokens: int
    learned: Callable[[float], None]
    was_ready: bool = False
    step_s: float = 0.0

    async def run(self) -> UnexpectedExit | None:
        """See ``ReplicaTask.run``; no process is left when this returns, unless on a lost node."""
        stopped = asyncio.create_task(self.stop.wait())
        starting = asyncio.ensure_future(self.start())
        try:
            await asyncio.wait({starting, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                return None
            return await self._live(starting.result(), stopped)
        except NodeLostError as error:
            return UnexpectedExit(reason=error.message, lost=True)
        except (OServeError, OSError) as error:
            return UnexpectedExit(reason=str(error))
        finally:
            await cancel(starting, stopped)
            await self.probe.close()

    async def _live(
        self, process: WatchedProcess, stopped: "asyncio.Task[Literal[True]]"
    ) -> UnexpectedExit | None:
        self.report(pid=process.pid)
        ended = asyncio.create_task(process.wait())
        # Its error is retrieved, whoever waits, so that asyncio logs no warning.
        ended.add_done_callback(lambda task: task.cancelled() or task.exception())
        watch = asyncio.create_task(self._watch(process))
        broken = asyncio.create_task(_broken(process))
        hangs = False
        try:
            await asyncio.wait({ended, watch, stopped, broken}, return_when=asyncio.FIRST_COMPLETED)
            if broken.done() and not ended.done():
                # It leaves before the other parts have ended: its requests would wait for that.
                self.report(phase=ReplicaPhase.HUNG, detail=broken.result())
                await asyncio.wait({ended, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if stopped.done():
                return None
            if ended.done():
                return await self._exited(process, ended.result())
            found = watch.result()
            hangs = found.hangs
            if hangs:
                # First it leaves: its streams resume elsewhere even if no signal reaches it.
                self.report(phase=ReplicaPhase.HUNG, detail=found.reason)
                await self._passes(_LEAVE_S, ended)
            return found
        finally:
            await cancel(watch, broken)
            await self._end(process, ended, kindly=not hangs)

    async def _end(
        self, process: WatchedProcess, ended: "asyncio.Task[int]", *, kindly: bool
    ) -> None:
        """Send TERM and wait, if ``kindly``, then KILL; returns when the processes are gone."""
        if ended.done():
            return
        try:
            if kindly:
                process.terminate()
                await self._passes(self.settings.stop_grace_s, ended)
        finally:
            # Also when this task is cancelled while it waits.
            if not ended.done():
                process.kill()
        await ended

    async def _passes(self, seconds: float, ended: "asyncio.Task[int]") -> None:
        """Wait so many seconds, or until it has ended."""
        passed = asyncio.ensure_future(self.clock.sleep(seconds))
        try:
            await asyncio.wait({ended, passed}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await cancel(passed)

    # -- while it loads -------------------------------------------------------------------------
    async def _watch(self, process: WatchedProcess) -> UnexpectedExit:
        """Wait until it is ready, then monitor it; returns why it must be ended."""
        if not self.was_ready:
            coming = asyncio.create_task(self._come_up(process))
            guard = asyncio.create_task(self._guard(process))
            try:
                await asyncio.wait({coming, guard}, return_when=asyncio.FIRST_COMPLETED)
                found = coming.result() if coming.done() else guard.result()
            finally:
                await cancel(coming, guard)
            if found is not None:
                return found
        return await self._monitor(process)

    async def _come_up(self, process: WatchedProcess) -> UnexpectedExit | None:
        """Wait until it serves or is on standby; returns why it must be ended if it does not."""
        limit_s = self.settings.start_timeout_s
        deadline_s = self.clock.now() + limit_s
        while not await self.probe.healthy():
            if self.clock.now() >= deadline_s:
                return await self._failed(process, f"not ready after {limit_s:.0f} s")
            await self.clock.sleep(_LOADING_POLL_S)
        models = await self.probe.models() or (ServedModel(name=self.model),)
        began_s = self.clock.now()
        left_s = max(1.0, deadline_s - began_s)
        name = models[0].name
        length = min(
            self.chunk_tokens, _MAX_STANDBY_PROMPT if self.standby else _MAX_WARM_UP_PROMPT
        )
        if models[0].max_model_len:
            length = min(length, models[0].max_model_len - _WARM_UP_TOKENS)
        length = max(1, length)
        prompt = [_WARM_UP_TOKEN] * length
        if not await self.probe.complete(name, prompt, _WARM_UP_TOKENS, left_s):
            return await self._failed(process, "did not answer its first request")
        if not self.standby:
            # Of a short prompt, the first request's fixed costs would be most of the time.
            token_s = (self.clock.now() - began_s) / length
            self.step_s = token_s * self.chunk_tokens
            self.learned(token_s)
        phase = ReplicaPhase.STANDBY if self.standby else ReplicaPhase.READY
        self.report(phase=phase, max_model_len=models[0].max_model_len)
        return None

    async def _guard(self, process: WatchedProcess) -> UnexpectedExit:
        """Monitor the processes of an engine that loads; returns when they stop making progress."""
        progress = self._progress()
        while True:
            activity = await process.activity()
            look = ProgressSample(
                now_s=self.clock.now(),
                counts=(float(activity.moved),) if activity is not None else None,
                activity=activity,
            )
            if reason := progress.observe(look, loading=True):
                return UnexpectedExit(reason=reason, hangs=True)
            await self.clock.sleep(self.settings.health_interval_s)

    # -- once it serves -------------------------------------------------------------------------
    def _progress(self) -> ProgressTracker:
        return ProgressTracker(
            after_s=self.settings.hang_after_s,
            steps=self.settings.hang_steps,
            interval_s=self.settings.health_interval_s,
            step_s=self.step_s,
        )

    async def _monitor(self, process: WatchedProcess) -> UnexpectedExit:
        """Probe it until it hangs.

        Each probe waits as long as it needs, so that one without an answer delays no other.
        """
        signs = _Signs()
        tasks = [
            asyncio.create_task(work)
            for work in (self._judge(process, signs), self._ask_core(signs), self._ask_load(signs))
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return done.pop().result()
        finally:
            await cancel(*tasks)

    async def _ask_core(self, signs: "_Signs") -> UnexpectedExit:
        while True:
            await self.clock.sleep(self.settings.health_interval_s)
            alive = await self.probe.alive()
            signs.asks = alive is not None
            signs.answered = signs.answered or bool(alive)

    async def _ask_load(self, signs: "_Signs") -> UnexpectedExit:
        while True:
            await self.clock.sleep(self.settings.health_interval_s)
            signs.load = await self._measure()

    async def _judge(self, process: WatchedProcess, signs: "_Signs") -> UnexpectedExit:
        progress = self._progress()
        ready_s = self.clock.now()
        while True:
            await self.clock.sleep(self.settings.health_interval_s)
            look = signs.taken(self.clock.now())
            if progress.silent_s > 0.0 or not look.answered:
                look = replace(look, activity=await process.activity())
            if reason := progress.observe(look, standby=self.standby):
                return UnexpectedExit(reason=reason, hangs=True)
            self.report(silent_s=progress.silent_s, patience_s=progress.limit_s)
            if progress.silent_s > 0.5 * progress.limit_s:
                ready_s = self.clock.now()
            elif self.clock.now() - ready_s >= self.settings.stable_s:
                self.stable()

    async def _exited(self, process: WatchedProcess, status: int) -> UnexpectedExit:
        if status == -signal.SIGKILL:
            return UnexpectedExit(reason=_ending(status))  # a killed process logs no cause
        return await self._failed(process, _ending(status))

    async def _failed(self, process: WatchedProcess, what: str) -> UnexpectedExit:
        """With the cause that its log names, if any."""
        cause = await process.cause()
        return UnexpectedExit(reason=f"{what}: {cause}" if cause else what)


@dataclass(slots=True)
class _Signs:
    """What probes of an engine have found. ``asks``: its core can be probed."""

    asks: bool = True
    answered: bool = False
    load: EngineLoad | None = None

    def taken(self, now_s: float) -> ProgressSample:
        """One sample; the next one has what is found from now on."""
        load = self.load
        look = ProgressSample(
            now_s=now_s,
            answered=self.answered,
            owes=self.asks or load is None or load.running > 0,
            running=load.running if load is not None else 0,
            counts=load.counts if load is not None else None,
        )
        self.answered = False
        return look


async def _broken(process: WatchedProcess) -> str:
    """See ``PartsProcess.broken``; an engine in one process is never broken in this way."""
    if isinstance(process, PartsProcess):
        return await process.broken()
    never: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    return await never


def _ending(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"ended by signal {-status}"


async def cancel(*tasks: "asyncio.Future[Any]") -> None:
    """Cancel tasks and wait for them; their results and errors are dropped."""
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.exception()
