"""The process that holds engines and gateway processes while servers come and go.

Runs as ``python -m oserve.engines.keeper``, one for each state folder and machine. One server at a
time talks to it over a Unix socket (see ``keeper_messages``). When that connection breaks, or
falls silent, the keeper keeps every process running for ``grace_s``; if no server connects, or is
heard again, by then, it ends them all but those that serve the node. They are its own children, so
that a reused process id cannot be mistaken for one of them, and no child outlives the keeper, even
if the keeper is killed.
"""

import argparse
import asyncio
import contextlib
import fcntl
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Coroutine
from pathlib import Path

from oserve.core import Clock, OServeError
from oserve.engines.clock import LiveClock
from oserve.engines.group import adopt_orphans, group_activity, start_ticks
from oserve.engines.keeper_children import (
    KeptChild,
    find_node_facts,
    remove_engine_folder,
    start_child,
    wait_all,
)
from oserve.engines.keeper_line import KeeperLine, refusal_of
from oserve.engines.keeper_messages import (
    MAX_LINE_BYTES,
    ActivityQuery,
    ActivityReport,
    CloseKeeper,
    EndProcesses,
    EngineStart,
    KeeperCommand,
    KeeperEvent,
    KeeperHello,
    MessageRejected,
    NodeFacts,
    NoteUpdate,
    Ping,
    Pong,
    ProcessExited,
    ProcessSignal,
    ProcessStart,
    ProcessStarted,
    ServerAccepted,
    ServerHello,
    ServerReplaced,
    StartRefused,
    command_of,
)
from oserve.engines.logs import telling_line
from oserve.engines.registry import end_leftovers, write_registry
from oserve.engines.spawner import Launcher, launcher_for

_log = logging.getLogger("oserve.keeper")

HELD_ELSEWHERE = 75
_HURRIED_S = 2.0
_POLL_S = 0.02


class Keeper:
    """Serves one server and holds many children. It makes ``folder``, and removes it at the end."""

    def __init__(
        self,
        *,
        folder: Path,
        registry: Path,
        launcher: Launcher,
        identity: str,
        grace_s: float,
        node: NodeFacts | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._folder = folder
        self._registry = registry
        self._launcher = launcher
        self._identity = identity
        self._grace_s = grace_s
        self._node = node or find_node_facts(folder, registry.parent)
        self._clock = clock or LiveClock()
        self._children: dict[str, KeptChild] = {}
        self._lines: set[KeeperLine] = set()
        self._server: KeeperLine | None = None
        self._owned = ServerHello(grace_s=grace_s)
        self._timer: asyncio.TimerHandle | None = None
        self._clearing: asyncio.Task[None] | None = None
        self._ending = asyncio.Event()
        self._patient = True
        self._asides: set[asyncio.Task[None]] = set()
        self._preparing: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Serve until told to close, or without a server for too long; leaves nothing behind."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._folder / "keeper.sock"
        path.unlink(missing_ok=True)
        self._write()
        server = await asyncio.start_unix_server(self._serve, str(path), limit=MAX_LINE_BYTES)
        self._left_alone()
        await self._ending.wait()
        server.close()
        path.unlink(missing_ok=True)
        await self._end_all(patient=self._patient, stayers=True)
        self._registry.unlink(missing_ok=True)
        shutil.rmtree(self._folder, ignore_errors=True)
        tasks = [line.task for line in self._lines if line.task is not None]
        for line in list(self._lines):
            line.writer.close()
        if tasks:
            await asyncio.wait(tasks, timeout=_HURRIED_S)

    def stop(self, *, patient: bool) -> None:
        """End; ``patient``: gateway processes get their grace to finish running requests."""
        self._patient = patient
        self._ending.set()

    # -- connections ----------------------------------------------------------------------------
    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = KeeperLine(writer)
        self._lines.add(line)
        held = [child.entry for child in self._children.values()]
        line.send(KeeperHello(identity=self._identity, pid=os.getpid(), held=held, node=self._node))
        # ValueError: the line is longer than the limit.
        with contextlib.suppress(OSError, ValueError):
            while text := await reader.readline():
                self._heard(line)
                if not line.refused:
                    self._handle(line, command_of(text))
        self._lines.discard(line)
        if line.watching is not None:
            line.watching.cancel()
        writer.close()
        if self._server is line and not self._ending.is_set():
            self._server = None
            self._left_alone()

    def _greet(self, line: KeeperLine, hello: ServerHello) -> None:
        """A guest wants to become the server."""
        served = self._server is not None and not self._server.silent
        left = any(not child.entry.stays for child in self._children.values())
        owned = self._owned if served or left else None
        refusal = refusal_of(hello, owned, served=served)
        if refusal is not None:
            _log.warning(
                "refused the server %s: the node is that of %s", hello.title, refusal.title
            )
            line.send(refusal)
            line.refused = True
            line.writer.close()
            return
        if self._server is not None and self._server is not line:
            # Servers lock their state folder: a new one of the same folder means that the previous
            # one has ended, or lost its connection without our knowing.
            self._server.send(ServerReplaced())
            self._server.writer.close()
        self._server, self._owned = line, hello
        self._grace_s = hello.grace_s
        self._attended()
        if hello.owner:
            line.send(ServerAccepted())
        if hello.silence_s and line.watching is None:
            line.watching = asyncio.create_task(
                line.watch_silence(self._clock, hello.silence_s, self._fell_silent)
            )
        idle = self._preparing is None or self._preparing.done()
        if hello.forks and idle and not self._ending.is_set():
            self._preparing = asyncio.create_task(self._launcher.prepare())

    def _heard(self, line: KeeperLine) -> None:
        if line.watch is not None:
            line.watch.heard()
        if line.silent:
            line.silent = False
            if line is self._server:
                _log.info("the server is heard again")
                self._attended()

    def _fell_silent(self, line: KeeperLine) -> None:
        if line is self._server:
            self._left_alone()

    def _left_alone(self) -> None:
        if self._timer is not None:  # the grace has begun with the silence
            return
        _log.info("no server; everything ends in %g s unless one connects", self._grace_s)
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._grace_s, self._give_up)

    def _attended(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None

    def _give_up(self) -> None:
        """No server has come in time."""
        self._timer = None
        if any(child.entry.stays for child in self._children.values()):
            self._clear(patient=True)
        else:
            self.stop(patient=True)

    def _tell(self, event: KeeperEvent) -> None:
        for line in self._lines:
            line.send(event)

    def _handle(self, line: KeeperLine, command: KeeperCommand | MessageRejected) -> None:
        match command:
            case ServerHello():
                self._greet(line, command)
            case Ping():
                line.send(Pong())
            case CloseKeeper():
                self.stop(patient=False)
            case EndProcesses():
                self._clear(patient=False)
            case EngineStart() | ProcessStart():
                self._start(command)
            case ActivityQuery(name=name):
                if name in self._children:
                    self._aside(self._report(line, self._children[name], log=command.log))
            case NoteUpdate(name=name, note=note):
                if name in self._children:
                    self._children[name].entry.note = note
                    self._write()
            case ProcessSignal(name=name, number=number):
                if name in self._children:
                    self._children[name].signal(number)
                    self._write()
            case MessageRejected(reason=reason):
                _log.error("%s", reason)
                line.send(command)

    def _aside(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.ensure_future(work)
        self._asides.add(task)
        task.add_done_callback(self._asides.discard)

    async def _report(self, line: KeeperLine, child: KeptChild, *, log: bool) -> None:
        name, pid, path = child.entry.name, child.entry.pid, Path(child.entry.log)
        if log:
            cause = await asyncio.to_thread(telling_line, path)
            line.send(ActivityReport(name=name, log=True, cause=cause))
            return
        activity = await asyncio.to_thread(group_activity, pid, path) if pid else None
        line.send(ActivityReport(name=name, activity=activity))

    # -- children -------------------------------------------------------------------------------
    def _write(self) -> None:
        write_registry(self._registry, [child.entry for child in self._children.values()])

    def _start(self, command: EngineStart | ProcessStart) -> None:
        busy = self._ending.is_set() or self._clearing is not None
        if command.name in self._children or busy:
            reason = "the keeper holds it already, or is ending what it holds"
            self._tell(StartRefused(name=command.name, reason=reason))
            return
        child = self._children[command.name] = KeptChild.of(command)
        # The registry names its devices as taken before a process uses them.
        self._write()
        child.task = asyncio.ensure_future(self._keep(child, command))

    async def _keep(self, child: KeptChild, command: EngineStart | ProcessStart) -> None:
        """Hold a child from its start to its end."""
        name = child.entry.name
        folder = command.folder if isinstance(command, EngineStart) else ""
        try:
            process = await start_child(command, self._launcher)
        except (OServeError, OSError) as error:
            self._forget(name, folder, StartRefused(name=name, reason=str(error)))
            return
        except asyncio.CancelledError:
            self._forget(name, folder, StartRefused(name=name, reason="it was told to end"))
            return
        child.process = process
        child.entry.pid = process.pid
        child.entry.started_ticks = start_ticks(process.pid)
        self._write()
        self._tell(ProcessStarted(name=name, pid=process.pid))
        status = await process.wait()
        cause = telling_line(Path(command.log))
        self._forget(name, folder, ProcessExited(name=name, status=status, cause=cause))

    def _forget(self, name: str, folder: str, event: StartRefused | ProcessExited) -> None:
        remove_engine_folder(folder)
        del self._children[name]
        self._write()
        self._tell(event)

    def _clear(self, *, patient: bool) -> None:
        """End everything but what stays."""
        if self._clearing is None:
            self._clearing = asyncio.ensure_future(self._end_all(patient=patient, stayers=False))
            self._clearing.add_done_callback(self._cleared)

    def _cleared(self, _task: "asyncio.Task[None]") -> None:
        self._clearing = None

    async def _end_all(self, *, patient: bool, stayers: bool) -> None:
        """End gateway processes first, so that running requests can finish; then the engines.

        ``stayers``: at last also what serves the node.
        """
        children = list(self._children.values())
        for child in children:  # a server that comes meanwhile takes none of them over
            child.entry.ending |= child.entry.engine
        others = [one for one in children if not one.entry.engine and not one.entry.stays]
        for child in others:
            child.signal(signal.SIGTERM)
        longest_s = max((child.grace_s for child in others), default=0.0)
        await wait_all(others, longest_s + _HURRIED_S if patient else _HURRIED_S)
        for child in others:
            child.signal(signal.SIGKILL)
        engines = [child for child in self._children.values() if child.entry.engine]
        for child in (one for one in engines if one.process is None):
            child.signal(signal.SIGTERM)
        if self._preparing is not None:
            self._preparing.cancel()
        await self._launcher.close()
        await wait_all([*others, *engines], 2 * _HURRIED_S)
        staying = [child for child in children if child.entry.stays] if stayers else []
        for number in (signal.SIGTERM, signal.SIGKILL):
            for child in staying:
                child.signal(number)
            await wait_all(staying, _HURRIED_S)


async def _main(arguments: argparse.Namespace) -> None:
    for name in await asyncio.to_thread(end_leftovers, arguments.registry):
        _log.warning("ended %s, left by a keeper that was killed", name)
    keeper = Keeper(
        folder=arguments.folder,
        registry=arguments.registry,
        launcher=launcher_for(arguments.method, arguments.logs / "zygote.log"),
        identity=arguments.identity,
        grace_s=arguments.grace,
        node=find_node_facts(arguments.folder, arguments.logs),
    )
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, lambda: keeper.stop(patient=False))
    await keeper.run()


def main() -> int:
    """Entry point; ``HELD_ELSEWHERE`` if the state folder has a keeper already."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="for sockets; short")
    parser.add_argument(
        "--registry", type=Path, required=True, help="file that lists what it holds"
    )
    parser.add_argument("--logs", type=Path, required=True, help="folder for the zygote's log")
    parser.add_argument("--method", choices=["auto", "zygote", "spawn"], required=True)
    parser.add_argument(
        "--identity", required=True, help="only a server of the same identity keeps what it holds"
    )
    parser.add_argument("--grace", type=float, required=True, help="seconds without a server")
    parser.add_argument(
        "--detach", action="store_true", help="fork: be no child of what has started it"
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    lock = os.open(arguments.registry.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return HELD_ELSEWHERE
    if arguments.detach:
        # The lock goes to the child, and stays with it.
        if os.fork():
            return 0
        os.setsid()
    adopt_orphans()
    asyncio.run(_main(arguments))
    _reap(_HURRIED_S)
    return 0


def _reap(limit_s: float) -> None:
    """Reap the orphans that this process has adopted."""
    end_s = time.monotonic() + limit_s
    with contextlib.suppress(ChildProcessError):
        while time.monotonic() < end_s:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(_POLL_S)


if __name__ == "__main__":
    sys.exit(main())
