"""The server's view of a process that a keeper holds, on this machine or another."""

import asyncio
import contextlib
import signal
from collections.abc import Callable

from oserve.control.progress import Activity
from oserve.core import OServeError
from oserve.engines.keeper_messages import (
    ActivityQuery,
    ActivityReport,
    KeeperCommand,
    NoteUpdate,
    ProcessEvent,
    ProcessExited,
    ProcessSignal,
    ProcessStarted,
    StartRefused,
)
from oserve.engines.registry import ProcessNote, RegistryEntry

_ANSWER_LIMIT_S = 5.0


class NodeLostError(OServeError):
    """A node cannot be reached; whether its processes still run is unknown."""

    def __init__(self, message: str, *, place: str = "", remedy: str = "") -> None:
        super().__init__(
            message,
            place=place or "cluster",
            remedy=remedy or "check that node, its network and its agent; it is taken up when back",
        )


class HeldProcess:
    """A process that a keeper holds; a ``WatchedProcess`` where it is an engine.

    ``send`` takes messages to the keeper.
    """

    def __init__(self, send: Callable[[KeeperCommand], None], entry: RegistryEntry) -> None:
        loop = asyncio.get_running_loop()
        self._send = send
        self.entry = entry
        self.ended: asyncio.Future[int] = loop.create_future()
        self._begun: asyncio.Future[int] = loop.create_future()
        self._asked: dict[bool, asyncio.Future[ActivityReport]] = {}
        self._cause = ""
        if entry.pid:
            self._begun.set_result(entry.pid)

    @property
    def pid(self) -> int:
        return self.entry.pid

    async def begun(self) -> "HeldProcess":
        """Wait until it runs. Raises ``OServeError`` if it could not be started.

        Cancelling this ends the process, and waits for its end.
        """
        try:
            await asyncio.shield(self._begun)
        except asyncio.CancelledError:
            if not self._begun.done():
                self.kill()
            with contextlib.suppress(OServeError):
                await self._begun
                self.kill()
                await self.wait()
            raise
        return self

    async def wait(self) -> int:
        """The exit status; negative: the signal. Raises ``NodeLostError`` if its node is lost."""
        return await asyncio.shield(self.ended)

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def mark(self, note: ProcessNote) -> None:
        """Replace its note."""
        self.entry.note = note
        if not self.ended.done():
            self._send(NoteUpdate(name=self.entry.name, note=note))

    async def activity(self) -> Activity | None:
        """See ``WatchedProcess``."""
        report = await self._ask(log=False)
        return report.activity if report is not None else None

    async def cause(self) -> str:
        """See ``WatchedProcess``."""
        report = None if self.ended.done() else await self._ask(log=True)
        return report.cause if report is not None else self._cause

    async def _ask(self, *, log: bool) -> ActivityReport | None:
        """Ask the keeper; ``None`` without an answer in time."""
        if self.ended.done():
            return None
        answer = self._asked.get(log)
        if answer is None:
            answer = self._asked[log] = asyncio.get_running_loop().create_future()
            self._send(ActivityQuery(name=self.entry.name, log=log))
        try:
            async with asyncio.timeout(_ANSWER_LIMIT_S):
                return await asyncio.shield(answer)
        except TimeoutError:
            self._asked.pop(log, None)
            return None

    def _signal(self, number: int) -> None:
        if not self.ended.done():
            self.entry.ending = True
            self._send(ProcessSignal(name=self.entry.name, number=number))

    def handle(self, event: ProcessEvent) -> None:
        """Take up what the keeper reports of this process."""
        match event:
            case ProcessStarted(pid=pid):
                self.entry.pid = pid
                if not self._begun.done():
                    self._begun.set_result(pid)
            case StartRefused(reason=reason):
                self._fail_start(no_start(reason))
                if not self.ended.done():
                    self.ended.set_result(-signal.SIGKILL)
                self._answer_all()
            case ProcessExited(status=status, cause=cause):
                self._cause = cause
                if not self.ended.done():
                    self.ended.set_result(status)
                self._answer_all()
            case ActivityReport(log=log):
                answer = self._asked.pop(log, None)
                if answer is not None and not answer.done():
                    answer.set_result(event)

    def lose(self, error: NodeLostError) -> None:
        """Its node is lost: nothing more will be heard of it."""
        self._fail_start(error)
        if not self.ended.done():
            self.ended.set_exception(error)
            self.ended.exception()
        self._answer_all()

    def _fail_start(self, error: OServeError) -> None:
        if not self._begun.done():
            self._begun.set_exception(error)
            # Retrieved here, so that asyncio logs no warning if nobody waits for it.
            self._begun.exception()

    def _answer_all(self) -> None:
        for log, answer in self._asked.items():
            if not answer.done():
                answer.set_result(ActivityReport(name=self.entry.name, log=log, cause=self._cause))
        self._asked.clear()


def no_start(reason: str) -> OServeError:
    """The error of a process that could not be started."""
    return OServeError(
        f"cannot start a process: {reason}",
        place="engines",
        remedy="read the log; check that the engine packages are installed (oserve[cpu] or [gpu])",
    )
