"""One engine in several processes on several nodes, behind the protocol of one.

See ``parts`` for what is decided; this module starts, signals and waits.
"""

import asyncio
import signal
from collections.abc import Awaitable, Callable, Sequence

from oserve.control.progress import Activity
from oserve.core import OServeError, ReplicaPart
from oserve.engines.held_process import NodeLostError
from oserve.engines.parts import EndPart, TiedParts, joint_activity
from oserve.engines.watched import WatchedProcess


class PartEndedError(OServeError):
    """A part of a replica has ended by itself, and so have the others; it says which and how."""

    def __str__(self) -> str:
        return self.message


class PartsProcess:
    """Implements ``WatchedProcess`` for the parts of one engine, given in the order of the parts.

    ``pid`` is the leader's. When one part ends or its node is lost, all end.
    """

    def __init__(self, parts: Sequence[ReplicaPart], processes: Sequence[WatchedProcess]) -> None:
        self.parts = tuple(parts)
        self.processes = tuple(processes)
        self._tied = TiedParts(parts)
        self._lost: NodeLostError | None = None
        self._broken = asyncio.Event()
        self._over = asyncio.Event()
        self._watches = [
            asyncio.create_task(self._watch(part.index, process))
            for part, process in zip(parts, processes, strict=True)
        ]

    @property
    def pid(self) -> int:
        return self.processes[0].pid

    async def wait(self) -> int:
        """The exit status of the first part that ended, once all have, if they were told to.

        Else raises ``PartEndedError`` or ``NodeLostError``, which name the part, its node and its
        ranks.
        """
        await self._over.wait()
        if self._lost is not None:
            raise NodeLostError(self._tied.reason or self._lost.message)
        if self._tied.reason:
            raise PartEndedError(self._tied.reason, place="engines", remedy="see that part's log")
        return self._tied.status or 0

    async def broken(self) -> str:
        """Wait until a part is gone, though nobody asked for it; returns which, and how.

        No request can be served from then on. The other parts may take a while to end.
        """
        await self._broken.wait()
        return self._tied.reason

    def terminate(self) -> None:
        self._carry_out(self._tied.asked(kill=False))

    def kill(self) -> None:
        self._carry_out(self._tied.asked(kill=True))

    async def activity(self) -> Activity | None:
        """See ``WatchedProcess``."""
        return joint_activity(await asyncio.gather(*(one.activity() for one in self.processes)))

    async def cause(self) -> str:
        """See ``WatchedProcess``: of the first part whose log names a cause."""
        causes = await asyncio.gather(*(one.cause() for one in self.processes))
        told = [(part, cause) for part, cause in zip(self.parts, causes, strict=True) if cause]
        return f"{told[0][0]}: {told[0][1]}" if told else ""

    async def _watch(self, index: int, process: WatchedProcess) -> None:
        try:
            status = await process.wait()
        except NodeLostError as error:
            self._lost = self._lost or error
            why = f"is out of reach: {error.message}"
            self._carry_out(self._tied.silent(index, why, -signal.SIGKILL))
            return
        # What a process logs before it is killed is no cause.
        cause = await process.cause() if status != -signal.SIGKILL else ""
        self._carry_out(self._tied.ended(index, status, cause))

    def _carry_out(self, orders: Sequence[EndPart]) -> None:
        for order in orders:
            process = self.processes[order.index]
            if order.kill:
                process.kill()
            else:
                process.terminate()
        if self._tied.reason:
            self._broken.set()
        if self._tied.is_over:
            self._over.set()


async def start_parts(
    parts: Sequence[ReplicaPart], start: Callable[[ReplicaPart], Awaitable[WatchedProcess]]
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
    except BaseException:  # also when this is cancelled: no part is left behind
        await _undo(starting)
        raise


async def _undo(starting: Sequence["asyncio.Future[WatchedProcess]"]) -> None:
    for one in starting:
        one.cancel()
    for outcome in await asyncio.gather(*starting, return_exceptions=True):
        if not isinstance(outcome, BaseException):
            outcome.kill()
            try:
                await outcome.wait()
            except NodeLostError:
                continue  # its keeper ends it


def _refused(part: ReplicaPart, error: BaseException) -> BaseException:
    if isinstance(error, NodeLostError):
        return NodeLostError(f"{part}: {error.message}")
    if isinstance(error, OServeError):
        return OServeError(f"{part}: {error.message}", place=error.place, remedy=error.remedy)
    if isinstance(error, OSError):
        return OServeError(
            f"{part}: {error}", place="engines", remedy="see the log of that node's keeper"
        )
    return error
