"""The server's side of one keeper: it has the keeper hold processes.

Engines that ``HeldEngines`` starts outlive this process for as long as the keeper waits for another
server, which can take them over. If the keeper of this machine is killed, every process that it
held ends, and the next start makes another keeper. A keeper of another node is called again by
whoever tends the node (``node_engines``).
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from oserve.core import HatchAddress
from oserve.engines.dial import (
    Dial,
    HatchDial,
    KeeperPlace,
    LocalDial,
    identity_of,
    keeper_runs,
    private_folder,
    private_name,
)
from oserve.engines.held_process import HeldProcess, NodeLostError, no_start
from oserve.engines.keeper_connection import KeeperConnection
from oserve.engines.keeper_messages import EngineStart, NodeFacts, ProcessStart, ServerHello
from oserve.engines.registry import ProcessNote

__all__ = [
    "HatchDial",
    "HeldEngines",
    "KeeperPlace",
    "LocalDial",
    "ServerOwner",
    "identity_of",
    "keeper_runs",
    "private_folder",
    "private_name",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOwner:
    """A server, for keepers of other machines: by its state folder (``key``), and for people."""

    key: str = ""
    title: str = ""


class HeldEngines:
    """Starts engines and other processes that a keeper holds.

    ``grace_s``: how long the keeper holds them when this process has ended. ``guest``: this is no
    server, but an agent that looks after the node; the server keeps its own connection. ``owner``:
    the server whose keeper this is to be; empty on its own machine, where a lock tells. ``forks``:
    see ``keeper_messages.ServerHello``.
    """

    def __init__(
        self,
        dial: Dial,
        *,
        grace_s: float,
        guest: bool = False,
        owner: ServerOwner | None = None,
        forks: bool = False,
    ) -> None:
        self._dial = dial
        self._owner = owner or ServerOwner()
        self._taken = ""
        self._grace_s = grace_s
        self._guest = guest
        self._forks = forks
        self._line: KeeperConnection | None = None
        self._lock = asyncio.Lock()
        self._closed = False

    @property
    def node(self) -> str:
        """The keeper's node."""
        return self._dial.node

    @property
    def hatch(self) -> HatchAddress | None:
        """Where the node's sockets are; ``None``: on this machine."""
        return self._dial.hatch

    @property
    def taken(self) -> str:
        """Which other server has the keeper, as of the last call; empty if none."""
        return self._taken

    @property
    def silent_s(self) -> float:
        """Seconds since the keeper was last heard, as far as this process was awake."""
        return self._line.silent_s if self._line is not None else 0.0

    def redirect(self, hatch: HatchAddress) -> None:
        """The node has another hatch; the next call uses it."""
        self._dial.hatch = hatch

    @property
    def facts(self) -> NodeFacts:
        """What the keeper has told of its node."""
        return self._line.facts if self._line is not None else NodeFacts()

    @property
    def folder(self) -> Path:
        """The folder for engines' folders, on the keeper's node."""
        return self._dial.folder or Path(self.facts.folder)

    @property
    def logs(self) -> Path:
        """The folder for logs, on the keeper's node."""
        return self._dial.logs or Path(self.facts.logs)

    async def connect(self) -> None:
        """Find the previous server's keeper, or on this machine start one.

        A keeper of another version or environment is told to end everything first. Raises
        ``OServeError`` if no keeper can be reached.
        """
        await self._ensure(call=True)

    async def lost(self) -> str:
        """Wait until the connection has broken; returns why."""
        line = self._line
        if line is None:
            return "it is not connected"
        await asyncio.wait({line.lost})
        return line.reason or "the connection to it has broken"

    def cut(self, reason: str) -> None:
        """Break the connection: the node counts as lost, as someone else has told."""
        if self._line is not None:
            self._line.cut(reason)

    def engines(self) -> dict[str, HeldProcess]:
        """Engines that the keeper holds now, by name."""
        return {name: item for name, item in self._held().items() if item.entry.engine}

    def processes(self) -> dict[str, HeldProcess]:
        """Other processes that the keeper holds for servers now, by name; a guest's: all others."""
        return {
            name: item
            for name, item in self._held().items()
            if not item.entry.engine and (self._guest or not item.entry.stays)
        }

    def _held(self) -> dict[str, HeldProcess]:
        return self._line.held if self._line is not None else {}

    async def launch(
        self,
        name: str,
        argv: Sequence[str],
        env: Mapping[str, str],
        cores: Sequence[int],
        log_path: Path,
        note: ProcessNote,
        *,
        folder: Path | None = None,
        model: str = "",
    ) -> HeldProcess:
        """Start an engine; see ``spawner.Launcher``. All paths are absolute, on its node.

        The keeper makes ``folder``, and room for the log. ``model``: see ``EngineStart``.
        """
        line = await self._ensure()
        command = EngineStart(
            name=name,
            argv=list(argv),
            env=dict(env),
            cores=list(cores),
            log=str(log_path),
            folder=str(folder or ""),
            model=model,
            note=note,
        )
        return await line.hold(command).begun()

    async def hold(
        self,
        name: str,
        argv: Sequence[str],
        first_line: str,
        log_path: Path,
        grace_s: float,
        note: ProcessNote,
        *,
        stays: bool = False,
    ) -> HeldProcess:
        """Start another process; see ``keeper_messages.ProcessStart``."""
        line = await self._ensure()
        command = ProcessStart(
            name=name,
            argv=list(argv),
            first_line=first_line,
            log=str(log_path),
            grace_s=grace_s,
            stays=stays,
            note=note,
        )
        return await line.hold(command).begun()

    async def close(self) -> None:
        """End every process that the keeper holds, and the keeper.

        On another node, what serves the node stays, and the keeper with it. A guest only leaves.
        """
        self._closed = True
        async with self._lock:
            line, self._line = self._line, None
            if line is None:
                return
            if self._guest:
                await line.part()
            elif self.hatch is not None:
                await line.clear()
                await line.part()
            else:
                await line.close()
                await self._dial.closed()

    async def _ensure(self, *, call: bool = False) -> KeeperConnection:
        """The connection. On another node only ``call`` makes one: who tends the node sorts out
        what runs there before anything starts."""
        async with self._lock:
            if self._closed:
                raise no_start("the server is ending")
            if self._line is not None and self._line.replaced:
                # Two servers that take a node from each other by turns would end every engine.
                raise NodeLostError(
                    f"node {self.node} is lost: {self._line.reason}",
                    remedy="stop that server, and start this one again",
                )
            if self._line is None or self._line.lost.done():
                if self.hatch is not None and not call:
                    raise NodeLostError(f"node {self.node} is lost: {await self._reason()}")
                self._line = await self._dial.reach()
                if not self._guest:
                    await self._present(self._line)
            return self._line

    async def _present(self, line: KeeperConnection) -> None:
        """Become the keeper's server. Raises ``NodeLostError`` if it has another one."""
        owner = self._owner
        hello = ServerHello(
            grace_s=self._grace_s,
            silence_s=self._dial.silence_s,
            owner=owner.key,
            title=owner.title,
            forks=self._forks,
        )
        line.send(hello)
        if owner.key:
            self._taken = await line.answered
            if self._taken:
                await line.part()
                raise NodeLostError(
                    f"node {self.node} cannot be used: {self._taken}",
                    remedy="stop that server, which gives its nodes back, or use other nodes",
                )

    async def _reason(self) -> str:
        return await self.lost() if self._line is not None else "it is not connected"
