"""The server's end of the connection to its keeper, and the processes behind it."""

import asyncio
import contextlib
import logging
import os
import select
import signal
from collections.abc import Callable
from pathlib import Path

import msgspec

from oserve.core import OServeError
from oserve.engines.group import end_group
from oserve.engines.keeper_messages import (
    MAX_LINE_BYTES,
    PROTOCOL_VERSION,
    CloseKeeper,
    EngineStart,
    KeeperCommand,
    KeeperEvent,
    KeeperHello,
    KeeperIdentity,
    MessageRejected,
    NoteUpdate,
    ProcessEvent,
    ProcessExited,
    ProcessSignal,
    ProcessStart,
    ProcessStarted,
    StartRefused,
    encoded,
    event_of,
    identity_in,
)
from oserve.engines.registry import ProcessNote, RegistryEntry

_log = logging.getLogger("oserve.engines")

_EXIT_LIMIT_S = 30.0


class HeldProcess:
    """A process that the keeper holds; an ``EngineProcess`` where it is an engine.

    ``send`` takes messages to the keeper.
    """

    def __init__(self, send: Callable[[KeeperCommand], None], entry: RegistryEntry) -> None:
        loop = asyncio.get_running_loop()
        self._send = send
        self.entry = entry
        self.ended: asyncio.Future[int] = loop.create_future()
        self._begun: asyncio.Future[int] = loop.create_future()
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
                if not self._begun.done():
                    self._begun.set_exception(no_start(reason))
                    # Retrieved here, so that asyncio logs no warning if nobody waits for it.
                    self._begun.exception()
                self._finish(-signal.SIGKILL)
            case ProcessExited(status=status):
                self._finish(status)

    def _finish(self, status: int) -> None:
        if not self.ended.done():
            self.ended.set_result(status)


class KeeperConnection:
    """One connection to one keeper. ``lost`` is done when it has broken.

    ``difference``: why the keeper's processes cannot be taken over; empty if they can.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        keeper: KeeperIdentity,
        held: list[RegistryEntry],
        difference: str,
    ) -> None:
        self._reader = reader
        self._writer = writer
        self.keeper = keeper
        self.difference = difference
        self.held = {entry.name: HeldProcess(self.send, entry) for entry in held}
        self.lost: asyncio.Task[None] = asyncio.create_task(self._listen())

    @classmethod
    async def open(cls, path: Path, identity: str) -> "KeeperConnection | None":
        """Connect to the keeper at ``path``; ``None`` if none answers.

        ``identity``: that of this server, see ``holding.identity_of``. Raises ``OServeError`` if
        what answers does not greet as a keeper.
        """
        try:
            reader, writer = await asyncio.open_unix_connection(str(path), limit=MAX_LINE_BYTES)
        except OSError:
            return None
        try:
            line = await reader.readline()
        except OSError:
            line = b""
        if not line:  # a keeper that is about to end
            writer.close()
            return None
        try:
            keeper = identity_in(line)
            if keeper.version != PROTOCOL_VERSION:
                difference = (
                    f"it speaks version {keeper.version} of the keeper protocol, "
                    f"this server version {PROTOCOL_VERSION}"
                )
                return cls(reader, writer, keeper, [], difference)
            hello = event_of(line)
            if not isinstance(hello, KeeperHello):
                raise msgspec.ValidationError("no greeting")
        except msgspec.DecodeError as error:
            writer.close()
            raise OServeError(
                f"a process listens here that does not greet as a keeper: {error}",
                place=str(path),
                remedy="end that process, or set --state-dir to another folder",
            ) from None
        same = hello.identity == identity
        difference = "" if same else "it runs another version of OServe, or another environment"
        return cls(reader, writer, keeper, hello.held, difference)

    def send(self, command: KeeperCommand) -> None:
        """Send a message, unless the connection has broken."""
        if not self.lost.done():
            self._writer.write(encoded(command))

    def hold(self, command: EngineStart | ProcessStart) -> HeldProcess:
        """Have the keeper start a process."""
        entry = RegistryEntry(
            name=command.name,
            engine=isinstance(command, EngineStart),
            log=command.log,
            note=command.note,
        )
        process = self.held[command.name] = HeldProcess(self.send, entry)
        self.send(command)
        return process

    async def close(self) -> None:
        """Have the keeper end every process and itself; returns when it has ended."""
        self.send(CloseKeeper())
        await asyncio.wait({self.lost}, timeout=_EXIT_LIMIT_S)
        if self.keeper.pid == os.getpid():
            return
        ended = await asyncio.to_thread(_await_exit, self.keeper.pid, _EXIT_LIMIT_S)
        if not ended:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.keeper.pid, signal.SIGKILL)
        await self.lost

    async def _listen(self) -> None:
        # ValueError: the line is longer than the limit.
        with contextlib.suppress(OSError, ValueError):
            while line := await self._reader.readline():
                self._read(line)
        self._writer.close()
        for process in list(self.held.values()):
            # Everything ends with its keeper; this covers helpers that lost their parent.
            if process.entry.engine and process.pid:
                await asyncio.to_thread(end_group, process.pid, grace_s=0)
            process.handle(StartRefused(name=process.entry.name, reason="the keeper ended"))
        self.held.clear()

    def _read(self, line: bytes) -> None:
        try:
            event = event_of(line)
        except msgspec.DecodeError as error:
            # Of a keeper whose processes this server does not take over, only the end counts.
            if not self.difference:
                _log.error("cannot read a message of the keeper: %s: %.200r", error, line)
            return
        self._handle(event)

    def _handle(self, event: KeeperEvent) -> None:
        match event:
            case ProcessStarted() | StartRefused() | ProcessExited():
                if event.name in self.held:
                    self.held[event.name].handle(event)
                    if not isinstance(event, ProcessStarted):
                        del self.held[event.name]
            case MessageRejected(name=name, reason=reason):
                _log.error("%s", reason)
                waiting = self.held.get(name)
                if waiting is not None and not waiting.pid:
                    self._handle(StartRefused(name=name, reason=reason))
            case KeeperHello():
                pass  # read before this connection was made


def no_start(reason: str) -> OServeError:
    """The error of a process that could not be started."""
    return OServeError(
        f"cannot start a process: {reason}",
        place="engines",
        remedy="read the log; check that the engine packages are installed (oserve[cpu] or [gpu])",
    )


def _await_exit(pid: int, limit_s: float) -> bool:
    """Whether a process, which need not be a child, ended in time."""
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:
        return True
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return bool(poll.poll(limit_s * 1e3))
    finally:
        os.close(descriptor)
