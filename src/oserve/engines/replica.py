"""One incarnation of one replica, from start to end: a task that starts, asks and ends it.

It reports what it sees through a callback and returns why it ended; what follows from that is the
cluster's and the control loop's business.
"""

import asyncio
import signal
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

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


class Prober(Protocol):
    """See ``oserve.engines.probe.Probe``."""

    async def healthy(self) -> bool: ...

    async def models(self) -> tuple[ServedModel, ...] | None: ...

    async def load(self) -> EngineLoad | None: ...

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
    replica has been ready without a break for ``settings.stable_s``.
    """

    clock: Clock
    settings: EngineSettings
    probe: Prober
    report: Callable[..., None]
    stable: Callable[[], None]
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> str | None:
        """Live until stopped (``None``) or ended by itself (why, for people to read)."""
        raise NotImplementedError

    async def _measure(self) -> None:
        load = await self.probe.load()
        if load is not None:
            self.report(
                running=load.running, waiting=load.waiting, kv_cache_usage=load.kv_cache_usage
            )


@dataclass(kw_only=True)
class VllmReplica(ReplicaTask):
    """A vLLM engine: ``start`` makes its processes, ``log_path`` is where they write.

    ``chunk_tokens``: what one of its steps may compute. ``was_ready``: it served before this task.
    ``standby``: when it can serve, it is not ready but waits for its weights.
    """

    start: Callable[[], Awaitable[EngineProcess]]
    log_path: Path
    model: str
    chunk_tokens: int
    was_ready: bool = False
    standby: bool = False

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
        watch = asyncio.create_task(self._watch())
        try:
            await asyncio.wait({ended, watch, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if stopped.done():
                return None
            if ended.done():
                return self._because(_ending(ended.result()))
            return watch.result()
        finally:
            await cancel(watch)
            await self._end(process, ended)

    async def _end(self, process: EngineProcess, ended: "asyncio.Task[int]") -> None:
        """TERM, the grace period, KILL; returns when the processes are gone."""
        if ended.done():
            return
        process.terminate()
        grace = asyncio.ensure_future(self.clock.sleep(self.settings.stop_grace_s))
        try:
            await asyncio.wait({ended, grace}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            # Also when this task is cancelled while it waits.
            await cancel(grace)
            if not ended.done():
                process.kill()
        await ended

    async def _watch(self) -> str:
        """Wait until it is ready, then look after it; returns why it must be ended."""
        if self.was_ready:
            return await self._look_after()
        limit_s = self.settings.start_timeout_s
        deadline_s = self.clock.now() + limit_s
        while not await self.probe.healthy():
            if self.clock.now() >= deadline_s:
                return self._because(f"not ready after {limit_s:.0f} s")
            await self.clock.sleep(_LOADING_POLL_S)
        models = await self.probe.models() or (ServedModel(name=self.model),)
        left_s = max(1.0, deadline_s - self.clock.now())
        name = models[0].name
        length = min(
            self.chunk_tokens, _MAX_STANDBY_PROMPT if self.standby else _MAX_WARM_UP_PROMPT
        )
        if models[0].max_model_len:
            length = min(length, models[0].max_model_len - _WARM_UP_TOKENS)
        prompt = [_WARM_UP_TOKEN] * max(1, length)
        if not await self.probe.complete(name, prompt, _WARM_UP_TOKENS, left_s):
            return self._because("did not answer its first request")
        phase = ReplicaPhase.STANDBY if self.standby else ReplicaPhase.READY
        self.report(phase=phase, max_model_len=models[0].max_model_len)
        return await self._look_after()

    async def _look_after(self) -> str:
        ready_s = self.clock.now()
        failed = 0
        while failed < self.settings.unhealthy_after:
            await self.clock.sleep(self.settings.health_interval_s)
            if await self.probe.healthy():
                failed = 0
                await self._measure()
                if self.clock.now() - ready_s >= self.settings.stable_s:
                    self.stable()
            else:
                failed += 1
                ready_s = self.clock.now()
        return f"failed {failed} health checks in a row"

    def _because(self, what: str) -> str:
        cause = telling_line(self.log_path) if "SIGKILL" not in what else ""
        return f"{what}: {cause}" if cause else what


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
