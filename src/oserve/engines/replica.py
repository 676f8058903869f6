"""One incarnation of one replica, from start to end: a task that starts, asks and ends it.

It reports what it sees through a callback and returns why it ended; what follows from that is the
cluster's and the control loop's business.
"""

import asyncio
import signal
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from oserve.control.progress import Activity, Progress, ProgressSample
from oserve.core import Clock, OServeError, ReplicaPhase
from oserve.engines.logs import telling_line
from oserve.engines.probe import Answer, EngineLoad, ServedModel
from oserve.engines.settings import EngineSettings
from oserve.engines.spawner import EngineProcess

_LOADING_POLL_S = 0.1
# Any token will do; a whole chunk of them makes the engine allocate what a full step needs.
_WARM_UP_TOKEN = 5
_MAX_WARM_UP_PROMPT = 8192
# One that waits for its weights does so beside engines that serve, which need the processors.
_MAX_STANDBY_PROMPT = 32
_WARM_UP_TOKENS = 2
# Until gateways have heard that it gets no more requests, and have its streams go on elsewhere.
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
        self, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> Answer: ...

    async def close(self) -> None: ...


@dataclass(kw_only=True)
class ReplicaTask:
    """What both kinds of replica need. Set ``stop`` to end it; ``run`` then returns ``None``.

    ``report`` takes fields of ``ReplicaState`` that changed; ``stable`` is called whenever the
    replica has been ready without a break for ``settings.stable_s``. ``standby``: when it can
    serve, it is not ready but waits for its weights.
    """

    clock: Clock
    settings: EngineSettings
    probe: Prober
    report: Callable[..., None]
    stable: Callable[[], None]
    standby: bool = False
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> str | None:
        """Live until stopped (``None``) or ended by itself (why, for people to read)."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Verdict:
    """Why an engine must be ended; one that hangs does not hear that it should end."""

    reason: str
    hangs: bool = False


@dataclass(kw_only=True)
class VllmReplica(ReplicaTask):
    """A vLLM engine: ``start`` makes its processes, ``log_path`` is where they write.

    ``chunk_tokens``: what one of its steps may compute. ``was_ready``: it served before this task.
    ``step_s``: what a whole chunk is known to take; ``learned`` hears of seconds a prompt token.
    ``look``: what the processes of a group do.
    """

    start: Callable[[], Awaitable[EngineProcess]]
    log_path: Path
    model: str
    chunk_tokens: int
    learned: Callable[[float], None]
    look: Callable[[int], Activity | None]
    was_ready: bool = False
    step_s: float = 0.0

    async def run(self) -> str | None:
        """See ``ReplicaTask.run``; no process is left when this returns."""
        stopped = asyncio.create_task(self.stop.wait())
        starting = asyncio.ensure_future(self.start())
        try:
            await asyncio.wait({starting, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                return None
            return await self._live(starting.result(), stopped)
        except (OServeError, OSError) as error:
            return str(error)
        finally:
            await cancel(starting, stopped)
            await self.probe.close()

    async def _live(self, process: EngineProcess, stopped: "asyncio.Task[Any]") -> str | None:
        self.report(pid=process.pid)
        ended = asyncio.create_task(process.wait())
        watch = asyncio.create_task(self._watch(process.pid))
        hangs = False
        try:
            await asyncio.wait({ended, watch, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if stopped.done():
                return None
            if ended.done():
                return self._because(_ending(ended.result()))
            verdict = watch.result()
            hangs = verdict.hangs
            if hangs:
                # First it leaves: its streams go on elsewhere even if no signal reaches it.
                self.report(phase=ReplicaPhase.HUNG, detail=verdict.reason)
                await self._passes(_LEAVE_S, ended)
            return verdict.reason
        finally:
            await cancel(watch)
            await self._end(process, ended, kindly=not hangs)

    async def _end(
        self, process: EngineProcess, ended: "asyncio.Task[int]", *, kindly: bool
    ) -> None:
        """TERM and the grace period, if ``kindly``, KILL; returns when the processes are gone."""
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
        """So many seconds, or until it has ended."""
        passed = asyncio.ensure_future(self.clock.sleep(seconds))
        try:
            await asyncio.wait({ended, passed}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await cancel(passed)

    # -- while it loads -------------------------------------------------------------------------
    async def _watch(self, pid: int) -> _Verdict:
        """Wait until it is ready, then look after it; returns why it must be ended."""
        if not self.was_ready:
            coming = asyncio.create_task(self._come_up())
            guard = asyncio.create_task(self._guard(pid))
            try:
                await asyncio.wait({coming, guard}, return_when=asyncio.FIRST_COMPLETED)
                verdict = coming.result() if coming.done() else guard.result()
            finally:
                await cancel(coming, guard)
            if verdict is not None:
                return verdict
        return await self._look_after(pid)

    async def _come_up(self) -> _Verdict | None:
        """Until it serves, or stands by; why it must be ended, if it does not come so far."""
        limit_s = self.settings.start_timeout_s
        deadline_s = self.clock.now() + limit_s
        while not await self.probe.healthy():
            if self.clock.now() >= deadline_s:
                return _Verdict(reason=self._because(f"not ready after {limit_s:.0f} s"))
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
            return _Verdict(reason=self._because("did not answer its first request"))
        if not self.standby:
            # Few tokens would tell only what the first request costs beside them.
            token_s = (self.clock.now() - began_s) / length
            self.step_s = token_s * self.chunk_tokens
            self.learned(token_s)
        phase = ReplicaPhase.STANDBY if self.standby else ReplicaPhase.READY
        self.report(phase=phase, max_model_len=models[0].max_model_len)
        return None

    async def _guard(self, pid: int) -> _Verdict:
        """Look at the processes of one that loads; returns when they do nothing any more."""
        progress = self._progress()
        while True:
            activity = self.look(pid)
            look = ProgressSample(
                now_s=self.clock.now(),
                counts=(float(activity.moved),) if activity is not None else None,
                activity=activity,
            )
            if reason := progress.observe(look, loading=True):
                return _Verdict(reason=self._because(reason), hangs=True)
            await self.clock.sleep(self.settings.health_interval_s)

    # -- once it serves -------------------------------------------------------------------------
    def _progress(self) -> Progress:
        return Progress(
            after_s=self.settings.hang_after_s,
            steps=self.settings.hang_steps,
            interval_s=self.settings.health_interval_s,
            step_s=self.step_s,
        )

    async def _look_after(self, pid: int) -> _Verdict:
        """Ask and judge until it hangs.

        Each question waits as long as it must, so that one without an answer holds up no other.
        """
        signs = _Signs()
        tasks = [
            asyncio.create_task(work)
            for work in (self._judge(pid, signs), self._ask_core(signs), self._ask_load(signs))
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return done.pop().result()
        finally:
            await cancel(*tasks)

    async def _ask_core(self, signs: "_Signs") -> _Verdict:
        while True:
            await self.clock.sleep(self.settings.health_interval_s)
            alive = await self.probe.alive()
            signs.asks = alive is not None
            signs.answered = signs.answered or bool(alive)

    async def _ask_load(self, signs: "_Signs") -> _Verdict:
        while True:
            await self.clock.sleep(self.settings.health_interval_s)
            signs.load = await self._measure()

    async def _judge(self, pid: int, signs: "_Signs") -> _Verdict:
        progress = self._progress()
        ready_s = self.clock.now()
        while True:
            await self.clock.sleep(self.settings.health_interval_s)
            look = signs.taken(self.clock.now())
            if progress.silent_s > 0.0 or not look.answered:
                look = replace(look, activity=self.look(pid))
            if reason := progress.observe(look, standby=self.standby):
                return _Verdict(reason=self._because(reason), hangs=True)
            self.report(silent_s=progress.silent_s, patience_s=progress.limit_s)
            if progress.silent_s > 0.5 * progress.limit_s:
                ready_s = self.clock.now()
            elif self.clock.now() - ready_s >= self.settings.stable_s:
                self.stable()

    def _because(self, what: str) -> str:
        untold = "SIGKILL" in what or what.startswith("hangs")
        cause = "" if untold else telling_line(self.log_path)
        return f"{what}: {cause}" if cause else what


@dataclass(slots=True)
class _Signs:
    """What questions to an engine have brought. ``asks``: its core can be asked."""

    asks: bool = True
    answered: bool = False
    load: EngineLoad | None = None

    def taken(self, now_s: float) -> ProgressSample:
        """As one look; the next has what comes from now on."""
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


def _ending(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"ended by signal {-status}"


async def cancel(*tasks: "asyncio.Future[Any]") -> None:
    """Cancel and wait; how they ended is of no interest any more."""
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.exception()
