"""One connection of a hatch: the greeting, then bytes both ways between TLS and a Unix socket.

What one side sends waits for the other: a side that cannot write has its counterpart stop reading.
An end of either side, after all bytes before it, ends both.
"""

import asyncio
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, cast

import msgspec

from oserve.nodes.hatch_messages import (
    CONTROL_COMMANDS,
    ControlCommand,
    ControlRejected,
    ControlReply,
)
from oserve.wire.hatch import (
    CONTROL_NAME,
    ECHO_NAME,
    MAX_LINE_BYTES,
    greeting_line,
    known_name,
    proved_name,
    verdict_line,
)

_MAX_CONTROL_BYTES = 4 * 1024 * 1024


class Doorkeeper(Protocol):
    """What a connection asks of the hatch that it belongs to."""

    folder: Path
    token: str
    answer_s: float

    def admit(self, visitor: "Visitor") -> str:
        """Take a connection in that has proved the token; why not, or nothing."""
        ...

    def turn_away(self, visitor: "Visitor", reason: str) -> None:
        """Note a refusal."""
        ...

    def left(self, visitor: "Visitor") -> None:
        """A connection is closed."""
        ...

    def control(self, command: ControlCommand) -> ControlReply:
        """Carry a control command out."""
        ...


class _End(asyncio.Protocol):
    """One side of a relay, and the other one."""

    def __init__(self, other: "_End | None" = None) -> None:
        self.other = other
        self.transport: asyncio.Transport | None = None
        # Bound once: a relay does nothing else for each piece.
        self._pass_on: Callable[[bytes], None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one by shape only

    def join(self, other: "_End") -> None:
        """What comes goes to the other side from now on."""
        self.other = other
        if other.transport is not None:
            self._pass_on = other.transport.write

    def data_received(self, data: bytes) -> None:
        if self._pass_on is not None:
            self._pass_on(data)

    def pause_writing(self) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        other, self.other = self.other, None
        if other is not None and other.transport is not None:
            # Sends first what it still has.
            other.transport.close()


class _Inner(_End):
    """The side of the Unix socket."""

    def __init__(self, visitor: "Visitor") -> None:
        super().__init__()
        self._visitor = visitor

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._visitor.opened(self)


class Visitor(_End):
    """The TLS side."""

    def __init__(self, hatch: Doorkeeper, key: int, peer: str) -> None:
        super().__init__()
        self.key = key
        self.peer = peer
        self.settled = False
        self._hatch = hatch
        self._nonce = secrets.token_hex(16)
        self._line = b""
        self._opening: asyncio.Task[None] | None = None
        self._take: Callable[[bytes], None] = self._take_line

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if self.transport is None:
            return
        if self.settled:  # it was cut off during the handshake
            self.transport.abort()
        else:
            self.transport.write(greeting_line(self._nonce))

    def data_received(self, data: bytes) -> None:
        if self._pass_on is not None:
            self._pass_on(data)
        else:
            self._take(data)

    def cut_off(self, reason: str) -> None:
        """Close without a word."""
        if not self.settled:
            self.settled = True
            self._hatch.turn_away(self, reason)
        if self.transport is not None:
            self.transport.abort()

    # -- the greeting ---------------------------------------------------------------------------
    def _take_line(self, data: bytes) -> None:
        self._line += data
        line, end, rest = self._line.partition(b"\n")
        if not end:
            if len(line) > MAX_LINE_BYTES:
                self.cut_off("its line is too long")
            return
        name = proved_name(self._hatch.token, self._nonce, line)
        if name is None:
            self.cut_off("wrong token, or a line of another connection")
        elif rest:
            self.cut_off("it did not wait for the answer")
        elif not known_name(name):
            self._refuse("there is no such name")
        elif reason := self._hatch.admit(self):
            self._refuse(reason)
        else:
            self._open(name)

    def _refuse(self, reason: str) -> None:
        if not self.settled:
            self.settled = True
            self._hatch.turn_away(self, reason)
        self._tell_off(reason)

    def _tell_off(self, reason: str) -> None:
        self._take = lambda _data: None
        if self.transport is not None:
            self.transport.write(verdict_line(reason))
            self.transport.close()

    def _open(self, name: str) -> None:
        self.settled = True
        self._line = b""
        transport = self.transport
        if transport is None:
            return
        if name == ECHO_NAME:
            self.join(self)
        elif name == CONTROL_NAME:
            self._take = self._take_command
        else:
            transport.pause_reading()
            self._opening = asyncio.ensure_future(self._connect(name))
            return
        transport.write(verdict_line())

    async def _connect(self, name: str) -> None:
        loop, path = asyncio.get_running_loop(), str(self._hatch.folder / name)
        try:
            async with asyncio.timeout(self._hatch.answer_s):
                await loop.create_unix_connection(lambda: _Inner(self), path)
        except OSError:
            self._tell_off("nothing listens there")

    def opened(self, inner: _End) -> None:
        """The socket within is connected. It may speak at once."""
        if self.transport is None:
            if inner.transport is not None:
                inner.transport.abort()
            return
        self.transport.write(verdict_line())
        inner.join(self)
        self.join(inner)
        self.transport.resume_reading()

    # -- control --------------------------------------------------------------------------------
    def _take_command(self, data: bytes) -> None:
        self._line += data
        *lines, self._line = self._line.split(b"\n")
        if len(self._line) > _MAX_CONTROL_BYTES:
            lines, self._line = [b""], b""
        for line in lines:
            reply: ControlReply
            try:
                reply = self._hatch.control(CONTROL_COMMANDS.decode(line))
            except msgspec.DecodeError as error:
                reply = ControlRejected(reason=str(error))
            if self.transport is not None:
                self.transport.write(msgspec.json.encode(reply) + b"\n")

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.settled:
            self.settled = True
            self._hatch.turn_away(self, "it left before its line was whole")
        if self.other is self:
            self.other = None
        super().connection_lost(exc)
        self._hatch.left(self)
