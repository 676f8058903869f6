"""The process that holds engines and gateway processes while servers come and go.

Runs as ``python -m oserve.engines.keeper``, one for each state folder. One server at a time talks
to it over a Unix socket (see ``keeper_messages``). When that connection breaks, the keeper keeps
every process running for ``grace_s``; if no server connects by then, it ends them all. They are its
own children, so that a reused process id cannot be mistaken for one of them, and no child outlives
the keeper, even if the keeper is killed.
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
from dataclasses import dataclass
from pathlib import Path

from oserve.core import OServeError
from oserve.engines.group import adopt_orphans, start_ticks
from oserve.engines.keeper_messages import (
    MAX_LINE_BYTES,
    CloseKeeper,
    EngineStart,
    KeeperCommand,
    KeeperEvent,
    KeeperHello,
    MessageRejected,
    NoteUpdate,
    ProcessExited,
    ProcessSignal,
    ProcessStart,
    ProcessStarted,
    ServerHello,
    StartRefused,
    command_of,
    encoded,
)
from oserve.engines.registry import RegistryEntry, end_leftovers, write_registry
from oserve.engines.spawner import EngineProcess, Launcher, launcher_for

_log = logging.getLogger("oserve.keeper")

HELD_ELSEWHERE = 75
_HURRIED_S = 2.0
_POLL_S = 0.02


class _PlainProcess:
    """A process that is no engine, behind the same protocol."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.pid = process.pid

    async def wait(self) -> int:
        return await self._process.wait()

    def terminate(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()


@dataclass(eq=False, slots=True)
class _Child:
    """``process`` is ``None`` while it starts; ``task`` lives from its start to its end."""

    entry: RegistryEntry
    grace_s: float = 0.0
    process: EngineProcess | None = None
    task: asyncio.Task[None] | None = None

    def signal(self, number: int) -> None:
        """Signal all of it; a child that has not started yet is cancelled."""
        self.entry.ending = True
        if self.process is None:
            if self.task is not None:
                self.task.cancel()
        elif number == signal.SIGKILL:
            self.process.kill()
        else:
            self.process.terminate()


class Keeper:
    """Serves one server and holds many children. It makes ``folder``, and removes it at the end."""

    def __init__(
        self, *, folder: Path, registry: Path, launcher: Launcher, identity: str, grace_s: float
    ) -> None:
        self._folder = folder
        self._registry = registry
        self._launcher = launcher
        self._identity = identity
        self._grace_s = grace_s
        self._children: dict[str, _Child] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._serving: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._ending = asyncio.Event()
        self._patient = True

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
        await self._end_all()
        self._registry.unlink(missing_ok=True)
        shutil.rmtree(self._folder, ignore_errors=True)
        if self._writer is not None and self._serving is not None:
            self._writer.close()
            await asyncio.wait({self._serving}, timeout=_HURRIED_S)

    def stop(self, *, patient: bool) -> None:
        """End; ``patient``: gateway processes get their grace to finish running requests."""
        self._patient = patient
        self._ending.set()

    # -- the connection -------------------------------------------------------------------------
    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._writer is not None:
            # Servers lock their state folder: a new one means that the previous one has ended.
            self._writer.close()
        self._writer = writer
        self._serving = asyncio.current_task()
        if self._timer is not None:
            self._timer.cancel()
        held = [child.entry for child in self._children.values()]
        self._send(KeeperHello(identity=self._identity, pid=os.getpid(), held=held))
        # ValueError: the line is longer than the limit.
        with contextlib.suppress(OSError, ValueError):
            while line := await reader.readline():
                self._handle(command_of(line))
        if self._writer is writer and not self._ending.is_set():
            writer.close()
            self._writer = None
            self._left_alone()

    def _left_alone(self) -> None:
        _log.info("no server; everything ends in %g s unless one connects", self._grace_s)
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._grace_s, lambda: self.stop(patient=True))

    def _send(self, event: KeeperEvent) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(encoded(event))

    def _handle(self, command: KeeperCommand | MessageRejected) -> None:
        match command:
            case ServerHello(grace_s=grace_s):
                self._grace_s = grace_s
            case CloseKeeper():
                self.stop(patient=False)
            case EngineStart() | ProcessStart():
                self._start(command)
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
                self._send(command)

    # -- children -------------------------------------------------------------------------------
    def _write(self) -> None:
        write_registry(self._registry, [child.entry for child in self._children.values()])

    def _start(self, command: EngineStart | ProcessStart) -> None:
        if command.name in self._children or self._ending.is_set():
            reason = "the keeper holds it already, or is ending"
            self._send(StartRefused(name=command.name, reason=reason))
            return
        entry = RegistryEntry(
            name=command.name,
            engine=isinstance(command, EngineStart),
            log=command.log,
            note=command.note,
        )
        child = self._children[command.name] = _Child(entry)
        match command:
            case EngineStart():
                entry.folder = command.env.get("TMPDIR", "")
            case ProcessStart():
                child.grace_s = command.grace_s
        # The registry names its devices as taken before a process uses them.
        self._write()
        child.task = asyncio.ensure_future(self._keep(child, command))

    async def _keep(self, child: _Child, command: EngineStart | ProcessStart) -> None:
        """Hold a child from its start to its end."""
        name = child.entry.name
        try:
            process = await self._started(command)
        except (OServeError, OSError) as error:
            self._forget(name, StartRefused(name=name, reason=str(error)))
            return
        except asyncio.CancelledError:
            self._forget(name, StartRefused(name=name, reason="it was told to end"))
            return
        child.process = process
        child.entry.pid = process.pid
        child.entry.started_ticks = start_ticks(process.pid)
        self._write()
        self._send(ProcessStarted(name=name, pid=process.pid))
        self._forget(name, ProcessExited(name=name, status=await process.wait()))

    async def _started(self, command: EngineStart | ProcessStart) -> EngineProcess:
        match command:
            case EngineStart():
                return await self._launcher.start(
                    command.argv, command.env, command.cores, Path(command.log)
                )
            case ProcessStart():
                return await _start_process(command)

    def _forget(self, name: str, event: StartRefused | ProcessExited) -> None:
        del self._children[name]
        self._write()
        self._send(event)

    async def _end_all(self) -> None:
        """End gateway processes first, so that running requests can finish; then the engines."""
        others = [child for child in self._children.values() if not child.entry.engine]
        for child in others:
            child.signal(signal.SIGTERM)
        longest_s = max((child.grace_s for child in others), default=0.0)
        await _all(others, longest_s + _HURRIED_S if self._patient else _HURRIED_S)
        for child in others:
            child.signal(signal.SIGKILL)
        engines = [child for child in self._children.values() if child.entry.engine]
        for child in engines:
            if child.process is None:
                child.signal(signal.SIGTERM)
        await self._launcher.close()
        await _all([*others, *engines], 2 * _HURRIED_S)


async def _start_process(command: ProcessStart) -> EngineProcess:
    with open(command.log, "ab") as output:  # noqa: ASYNC230
        process = await asyncio.create_subprocess_exec(
            *command.argv, stdin=asyncio.subprocess.PIPE, stdout=output, stderr=output
        )
    if process.stdin is not None:  # which a pipe for standard input ensures
        process.stdin.write(command.first_line.encode() + b"\n")
    return _PlainProcess(process)


async def _all(children: list[_Child], limit_s: float) -> None:
    tasks = [child.task for child in children if child.task is not None]
    if tasks:
        await asyncio.wait(tasks, timeout=limit_s)


async def _main(arguments: argparse.Namespace) -> None:
    for name in await asyncio.to_thread(end_leftovers, arguments.registry):
        _log.warning("ended %s, left by a keeper that was killed", name)
    keeper = Keeper(
        folder=arguments.folder,
        registry=arguments.registry,
        launcher=launcher_for(arguments.method, arguments.logs / "zygote.log"),
        identity=arguments.identity,
        grace_s=arguments.grace,
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
    parser.add_argument("--method", choices=["zygote", "spawn"], required=True)
    parser.add_argument(
        "--identity", required=True, help="only a server of the same identity keeps what it holds"
    )
    parser.add_argument("--grace", type=float, required=True, help="seconds without a server")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    lock = os.open(arguments.registry.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return HELD_ELSEWHERE
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
