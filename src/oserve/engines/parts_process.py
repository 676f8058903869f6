"""One engine in several processes on several nodes, behind the protocol of one.

See ``parts`` for what is decided; this module starts, signals and waits.
"""

import asyncio
import signal
from collections.abc import Awaitable, Callable, Sequence

from oserve.core import OServeError, ReplicaPart
from oserve.engines.parts import EndPart, TiedParts
from oserve.engines.spawner import EngineProcess


class PartsProcess:
    """Implements ``EngineProcess`` for the parts of one engine, given in the order of the parts.

    ``pid`` is the leader's. When one part ends, all end. ``wait`` returns the status of the first,
    and ``cause`` then names the part, its node and its ranks.
    """

    def __init__(self, parts: Sequence[ReplicaPart], processes: Sequence[EngineProcess]) -> None:
        self.parts = tuple(parts)
        self.processes = tuple(processes)
        self._tied = TiedParts(parts)
        self._over: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._watches = [
            asyncio.create_task(self._watch(part.index, process))
            for part, process in zip(parts, processes, strict=True)
        ]

    @property
    def pid(self) -> int:
        return self.processes[0].pid

    @property
    def cause(self) -> str:
        """Which part ended first, and how; empty if none did, or if the replica was told to end."""
        return self._tied.reason

    async def wait(self) -> int:
        return await asyncio.shield(self._over)

    def terminate(self) -> None:
        self._carry_out(self._tied.asked(kill=False))

    def kill(self) -> None:
        self._carry_out(self._tied.asked(kill=True))

    def lose(self, node: str, why: str) -> None:
        """A node cannot be reached any more: the parts elsewhere end, the one there is given up."""
        for part in self.parts:
            if part.node == node:
                self._carry_out(self._tied.silent(part.index, why, -signal.SIGKILL))
                self._watches[part.index].cancel()

    async def _watch(self, index: int, process: EngineProcess) -> None:
        status = await process.wait()
        self._carry_out(self._tied.ended(index, status, str(getattr(process, "cause", ""))))

    def _carry_out(self, orders: Sequence[EndPart]) -> None:
        for order in orders:
            process = self.processes[order.index]
            if order.kill:
                process.kill()
            else:
                process.terminate()
        if self._tied.is_over and not self._over.done():
            self._over.set_result(self._tied.status or 0)


async def start_parts(
    parts: Sequence[ReplicaPart], start: Callable[[ReplicaPart], Awaitable[EngineProcess]]
) -> PartsProcess:
    """Start all parts at once; they wait for each other.

    Raises ``OServeError``, naming the part, if one cannot be started; no other is left then. The
    same holds when this is cancelled.
    """
    starting = [asyncio.ensure_future(start(part)) for part in parts]
    try:
        await asyncio.wait(starting, return_when=asyncio.FIRST_EXCEPTION)
        for part, one in zip(parts, starting, strict=True):
            if one.done() and (error := one.exception()) is not None:
                raise _refused(part, error)
        return PartsProcess(parts, [one.result() for one in starting])
    except BaseException:
        await _undo(starting)
        raise


async def _undo(starting: Sequence["asyncio.Future[EngineProcess]"]) -> None:
    for one in starting:
        one.cancel()
    for outcome in await asyncio.gather(*starting, return_exceptions=True):
        if not isinstance(outcome, BaseException):
            outcome.kill()
            await outcome.wait()


def _refused(part: ReplicaPart, error: BaseException) -> BaseException:
    if isinstance(error, OServeError):
        return OServeError(f"{part}: {error.message}", place=error.place, remedy=error.remedy)
    if isinstance(error, OSError):
        return OServeError(
            f"{part}: {error}", place="engines", remedy="see the log of that node's keeper"
        )
    return error
