"""The hub's call to one gateway process on another node; see ``hub_lines``."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, Protocol

import msgspec

from oserve.core import Clock
from oserve.gateway.process.hub_lines import framed, parted
from oserve.gateway.process.messages import (
    PROCESS_MESSAGES,
    HubReply,
    OperatorAnswer,
    OperatorCall,
    WorkerReport,
)

_log = logging.getLogger("oserve.gateway")

HubStreams = tuple[asyncio.StreamReader, asyncio.StreamWriter]

_PAUSE_S: Final = 0.2
_LONGEST_PAUSE_S: Final = 5.0
# A process reports ten times a second.
_SILENCE_S: Final = 5.0
# An operator's call may last long; nobody has so many at once.
_MOST_CALLS: Final = 64


class CallAnswerer(Protocol):
    """What a hub answers; see ``Hub``."""

    def reply(self, report: WorkerReport, node: str) -> HubReply:
        """The answer to a report of a process on that node."""
        ...

    async def operated(self, call: OperatorCall) -> OperatorAnswer:
        """The answer to an operator's call."""
        ...


class HubCall:
    """Calls a process, and calls again whenever the call breaks or falls silent.

    ``dial`` opens the way to the process; it raises OSError.
    """

    def __init__(
        self, node: str, hub: CallAnswerer, dial: Callable[[], Awaitable[HubStreams]], clock: Clock
    ) -> None:
        self._node = node
        self._hub = hub
        self._dial = dial
        self._clock = clock
        self._asides: set[asyncio.Task[None]] = set()
        self.reason = "it has not been called yet"

    async def run(self) -> None:
        """Call until cancelled."""
        pause_s = _PAUSE_S
        while True:
            heard = False
            try:
                heard = await self._talk(*await self._dial())
            except (OSError, ValueError, msgspec.DecodeError) as error:
                self.reason = str(error) or "it has fallen silent"
            # An unforeseen fault must not leave the process without a hub.
            except Exception as error:
                _log.exception("a gateway process of node %s could not be answered", self._node)
                self.reason = f"a fault of the server, see its log: {type(error).__name__}"
            pause_s = _PAUSE_S if heard else min(2.0 * pause_s, _LONGEST_PAUSE_S)
            await self._clock.sleep(pause_s)

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answer what comes, until the call ends; whether anything came."""
        heard = False
        try:
            with contextlib.suppress(OSError):
                while True:
                    async with asyncio.timeout(_SILENCE_S):
                        line = await reader.readline()
                    if not line:
                        break
                    heard = True
                    self._answer(line, writer)
            self.reason = "the call has broken off"
            return heard
        finally:
            writer.transport.abort()
            for task in self._asides:
                task.cancel()

    def _answer(self, line: bytes, writer: asyncio.StreamWriter) -> None:
        number, text = parted(line)
        match PROCESS_MESSAGES.decode(text):
            case WorkerReport() as report:
                reply = self._hub.reply(report, self._node)
                writer.write(framed(number, msgspec.json.encode(reply)))
            case OperatorCall() as call:
                self._aside(self._operate(number, call, writer))

    async def _operate(self, number: int, call: OperatorCall, writer: asyncio.StreamWriter) -> None:
        answer = OperatorAnswer(status=503, body=b"{}")
        if len(self._asides) <= _MOST_CALLS:
            answer = await self._hub.operated(call)
        if not writer.is_closing():
            writer.write(framed(number, msgspec.json.encode(answer)))

    def _aside(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._asides.add(task)
        task.add_done_callback(self._asides.discard)
