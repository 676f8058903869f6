"""The server's end of a connection to a keeper."""

import asyncio
import contextlib
import logging
import os
import select
import signal
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from oserve.core import Clock, OServeError
from oserve.engines.clock import LiveClock
from oserve.engines.group import end_group
from oserve.engines.held_process import HeldProcess, NodeLostError
from oserve.engines.keeper_messages import (
    PROTOCOL_VERSION,
    ActivityReport,
    CloseKeeper,
    EndProcesses,
    EngineStart,
    KeeperCommand,
    KeeperEvent,
    KeeperHello,
    KeeperIdentity,
    MessageRejected,
    NodeFacts,
    Ping,
    Pong,
    ProcessExited,
    ProcessStart,
    ProcessStarted,
    ServerAccepted,
    ServerRefused,
    ServerReplaced,
    StartRefused,
    encoded,
    event_of,
    identity_in,
)
from oserve.engines.line_watch import PING_S, LineWatch
from oserve.engines.registry import RegistryEntry

_log = logging.getLogger("oserve.engines")

_EXIT_LIMIT_S = 30.0

LineStreams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass(frozen=True, slots=True, kw_only=True)
class LineTerms:
    """What a connection to a keeper is like.

    ``node``: the keeper's, for messages. ``place``: of the keeper, for errors. ``local``: on this
    machine, where everything ends with its keeper. ``silence_s``: longest silence; 0: any.
    ``differs``: why the processes of a keeper that greets so cannot be taken over, else empty.
    """

    node: str
    place: str
    local: bool
    differs: Callable[[KeeperHello], str]
    silence_s: float = 0.0
    clock: Clock = LiveClock()  # noqa: RUF009 - it has no state


class KeeperConnection:
    """One connection to one keeper. ``lost`` is done when it has broken; ``reason`` tells why.

    ``difference``: why the keeper's processes cannot be taken over; empty if they can.
    ``replaced``: another server has the keeper now. ``answered`` tells whether this server may have
    it: empty, or why not.
    """

    def __init__(
        self,
        streams: LineStreams,
        terms: LineTerms,
        keeper: KeeperIdentity,
        hello: KeeperHello | None,
        difference: str,
    ) -> None:
        self._reader, self._writer = streams
        self._terms = terms
        self.keeper = keeper
        self.difference = difference
        self.facts = hello.node if hello is not None else NodeFacts()
        self.reason = ""
        self.replaced = False
        self.answered: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._watch = LineWatch(terms.clock.now(), terms.silence_s)
        held = hello.held if hello is not None else []
        self.held = {entry.name: HeldProcess(self.send, entry) for entry in held}
        self.lost: asyncio.Task[None] = asyncio.create_task(self._listen())

    @classmethod
    async def greeted(cls, streams: LineStreams, terms: LineTerms) -> "KeeperConnection | None":
        """Read the keeper's greeting; ``None`` if the connection ends first.

        Raises ``OServeError`` if what answers does not greet as a keeper. If this is cancelled, the
        connection is closed.
        """
        reader, writer = streams
        try:
            line = await reader.readline()
        except OSError:
            line = b""
        except asyncio.CancelledError:
            writer.transport.abort()
            raise
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
                return cls(streams, terms, keeper, None, difference)
            hello = event_of(line)
            if not isinstance(hello, KeeperHello):
                raise msgspec.ValidationError("no greeting")
        except msgspec.DecodeError as error:
            writer.close()
            raise OServeError(
                f"a process listens here that does not greet as a keeper: {error}",
                place=terms.place,
                remedy="end that process, or set --state-dir to another folder",
            ) from None
        return cls(streams, terms, keeper, hello, terms.differs(hello))

    def send(self, command: KeeperCommand) -> None:
        """Send a message, unless the connection has broken."""
        if not self.lost.done() and not self._writer.is_closing():
            self._writer.write(encoded(command))

    def hold(self, command: EngineStart | ProcessStart) -> HeldProcess:
        """Have the keeper start a process."""
        entry = RegistryEntry(
            name=command.name,
            engine=isinstance(command, EngineStart),
            log=command.log,
            folder=command.folder if isinstance(command, EngineStart) else "",
            note=command.note,
        )
        process = self.held[command.name] = HeldProcess(self.send, entry)
        self.send(command)
        return process

    @property
    def silent_s(self) -> float:
        """See ``LineWatch``; 0 of a connection that is not watched."""
        return self._watch.silent_s

    def cut(self, reason: str) -> None:
        """Break the connection: its node counts as lost."""
        self.reason = self.reason or reason
        self._writer.transport.abort()

    async def part(self) -> None:
        """Disconnect; the keeper's processes go on."""
        self.cut("this server has disconnected")
        await asyncio.wait({self.lost})

    async def clear(self) -> None:
        """Have the keeper end every process but those that stay; returns when they have ended."""
        self.send(EndProcesses())
        leaving = [item.ended for item in self.held.values() if not item.entry.stays]
        if leaving:
            await asyncio.wait(leaving, timeout=_EXIT_LIMIT_S)

    async def close(self) -> None:
        """Have the keeper end every process and itself; returns when it has ended."""
        self.send(CloseKeeper())
        await asyncio.wait({self.lost}, timeout=_EXIT_LIMIT_S)
        if not self._terms.local:
            await self.part()
            return
        if self.keeper.pid == os.getpid():
            return
        ended = await asyncio.to_thread(_await_exit, self.keeper.pid, _EXIT_LIMIT_S)
        if not ended:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.keeper.pid, signal.SIGKILL)
        await self.lost

    async def _listen(self) -> None:
        pings = asyncio.create_task(self._ping()) if self._terms.silence_s else None
        # ValueError: the line is longer than the limit.
        with contextlib.suppress(OSError, ValueError):
            while line := await self._reader.readline():
                self._watch.heard()
                self._read(line)
        if pings is not None:
            pings.cancel()
        self._writer.close()
        if not self.answered.done():
            self.answered.set_result("")  # a lost line: that tells all
        lost = not self._terms.local or bool(self.reason)
        self.reason = self.reason or ("the connection to it has broken" if lost else "")
        # Until the last has been told, more may be asked for.
        while self.held:
            await self._let_go(self.held.pop(next(iter(self.held))), lost=lost)

    async def _let_go(self, process: HeldProcess, *, lost: bool) -> None:
        if lost:
            process.lose(NodeLostError(f"node {self._terms.node} is lost: {self.reason}"))
            return
        # Everything ends with its keeper; this covers helpers that lost their parent.
        if process.entry.engine and process.pid:
            await asyncio.to_thread(end_group, process.pid, grace_s=0)
        process.handle(StartRefused(name=process.entry.name, reason="the keeper ended"))

    async def _ping(self) -> None:
        while True:
            self._writer.write(encoded(Ping()))
            await self._terms.clock.sleep(PING_S)
            if self._watch.is_lost(self._terms.clock.now()):
                self.cut(f"nothing has been heard of it for {self._watch.silent_s:.0f} s")

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
            case ProcessStarted() | StartRefused() | ProcessExited() | ActivityReport():
                if event.name in self.held:
                    self.held[event.name].handle(event)
                    if isinstance(event, StartRefused | ProcessExited):
                        del self.held[event.name]
            case MessageRejected(name=name, reason=reason):
                _log.error("%s", reason)
                waiting = self.held.get(name)
                if waiting is not None and not waiting.pid:
                    self._handle(StartRefused(name=name, reason=reason))
            case ServerReplaced():
                self.replaced = True
                self.reason = "another server has taken its processes over"
            case ServerAccepted():
                self._answer("")
            case ServerRefused(title=title, grace_s=grace_s):
                until = f", and is held for it for at most {grace_s:.0f} s" if grace_s else ""
                self.reason = f"it serves another server: {title or 'unnamed'}{until}"
                self._answer(self.reason)
            case Pong() | KeeperHello():
                pass  # that it came is enough; the greeting was read before

    def _answer(self, refusal: str) -> None:
        if not self.answered.done():
            self.answered.set_result(refusal)


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
