"""The process that holds engines and gateway processes while servers come and go.

Runs as ``python -m oserve.engines.keeper``, one for each state folder. One server at a time talks
to it over a Unix socket, in JSON lines (``registry.Ask``, ``registry.Tell``). When that line breaks
it keeps everything running for ``grace_s``; if no server has come by then, it ends it all. What it
holds are its own children, so a number that was reused cannot be mistaken for one of them, and none
outlives it, even if it is killed.
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

import msgspec

from oserve.core import OServeError
from oserve.engines import registry as lines
from oserve.engines.group import adopt_orphans, start_ticks
from oserve.engines.registry import RegistryEntry, end_leftovers, write_registry
from oserve.engines.spawner import EngineProcess, Launcher, launcher_for

_log = logging.getLogger("oserve.keeper")

HELD_ELSEWHERE = 75
_HURRIED_S = 2.0
_POLL_S = 0.02


@dataclass(eq=False, slots=True)
class _Child:
    entry: RegistryEntry
    grace_s: float = 0.0
    engine: EngineProcess | None = None
    process: asyncio.subprocess.Process | None = None
    task: asyncio.Task[None] | None = None

    def signal(self, number: int) -> None:
        """To all of it; one that is only starting does not come."""
        self.entry.ending = True
        if self.engine is not None:
            (self.engine.kill if number == signal.SIGKILL else self.engine.terminate)()
        elif self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)
        elif self.task is not None:
            self.task.cancel()


class Keeper:
    """The loop: one server's line, many children. ``folder`` is made, and removed at the end."""

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
        self._decoder = msgspec.json.Decoder(lines.Ask)

    async def run(self) -> None:
        """Until told to close, or left alone for too long; nothing is left afterwards."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._folder / "keeper.sock"
        path.unlink(missing_ok=True)
        self._write()
        server = await asyncio.start_unix_server(self._serve, str(path), limit=lines.MAX_LINE_BYTES)
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
        """End; ``patient``: running requests of gateway processes get their grace."""
        self._patient = patient
        self._ending.set()

    # -- the line -------------------------------------------------------------------------------
    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._writer is not None:
            # Servers lock their state folder: one that comes means that the other is gone.
            self._writer.close()
        self._writer = writer
        self._serving = asyncio.current_task()
        if self._timer is not None:
            self._timer.cancel()
        self._tell(
            lines.Hello(
                identity=self._identity,
                pid=os.getpid(),
                held=[child.entry for child in self._children.values()],
            )
        )
        with contextlib.suppress(OSError, ValueError, msgspec.DecodeError):
            while line := await reader.readline():
                self._hear(self._decoder.decode(line))
        if self._writer is writer and not self._ending.is_set():
            writer.close()
            self._writer = None
            self._left_alone()

    def _left_alone(self) -> None:
        _log.info("no server; everything ends in %g s unless one comes", self._grace_s)
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._grace_s, lambda: self.stop(patient=True))

    def _tell(self, message: lines.Tell) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(msgspec.json.encode(message) + b"\n")

    def _hear(self, ask: lines.Ask) -> None:
        match ask:
            case lines.Greet(grace_s=grace_s):
                self._grace_s = grace_s
            case lines.Close():
                self.stop(patient=False)
            case lines.Start() | lines.Hold():
                self._start(ask)
            case lines.Mark(name=name, note=note):
                if name in self._children:
                    self._children[name].entry.note = note
                    self._write()
            case lines.Signal(name=name, number=number):
                if name in self._children:
                    self._children[name].signal(number)
                    self._write()

    # -- children -------------------------------------------------------------------------------
    def _write(self) -> None:
        write_registry(self._registry, [child.entry for child in self._children.values()])

    def _start(self, ask: lines.Start | lines.Hold) -> None:
        if ask.name in self._children or self._ending.is_set():
            self._tell(lines.Refused(name=ask.name, reason="it is held already, or all is ending"))
            return
        engine = isinstance(ask, lines.Start)
        entry = RegistryEntry(name=ask.name, engine=engine, log=ask.log, note=ask.note)
        child = self._children[ask.name] = _Child(entry)
        if isinstance(ask, lines.Start):
            entry.folder = ask.env.get("TMPDIR", "")
        else:
            child.grace_s = ask.grace_s
        # Its devices are written down as taken before anything is on them.
        self._write()
        child.task = asyncio.ensure_future(self._keep(child, ask))

    async def _keep(self, child: _Child, ask: lines.Start | lines.Hold) -> None:
        """From a child's start to its end."""
        name = child.entry.name
        try:
            if isinstance(ask, lines.Start):
                child.engine = await self._launcher.start(
                    ask.argv, ask.env, ask.cores, Path(ask.log)
                )
                pid = child.engine.pid
            else:
                child.process = await _process(ask)
                pid = child.process.pid
        except (OServeError, OSError) as error:
            self._forget(name, lines.Refused(name=name, reason=str(error)))
            return
        except asyncio.CancelledError:
            self._forget(name, lines.Refused(name=name, reason="it was told to end"))
            return
        child.entry.pid = pid
        child.entry.started_ticks = start_ticks(pid)
        self._write()
        self._tell(lines.Started(name=name, pid=pid))
        if child.engine is not None:
            status = await child.engine.wait()
        else:
            assert child.process is not None
            status = await child.process.wait()
        self._forget(name, lines.Ended(name=name, status=status))

    def _forget(self, name: str, message: lines.Tell) -> None:
        del self._children[name]
        self._write()
        self._tell(message)

    async def _end_all(self) -> None:
        """Gateway processes first, so that running requests can end; then every engine."""
        others = [child for child in self._children.values() if not child.entry.engine]
        for child in others:
            child.signal(signal.SIGTERM)
        longest_s = max((child.grace_s for child in others), default=0.0)
        await _all(others, longest_s + _HURRIED_S if self._patient else _HURRIED_S)
        for child in others:
            child.signal(signal.SIGKILL)
        engines = [child for child in self._children.values() if child.entry.engine]
        for child in engines:
            if child.engine is None:
                child.signal(signal.SIGTERM)
        await self._launcher.close()
        await _all([*others, *engines], 2 * _HURRIED_S)


async def _process(ask: lines.Hold) -> asyncio.subprocess.Process:
    with open(ask.log, "ab") as output:  # noqa: ASYNC230
        process = await asyncio.create_subprocess_exec(
            *ask.argv, stdin=asyncio.subprocess.PIPE, stdout=output, stderr=output
        )
    assert process.stdin is not None
    process.stdin.write(ask.orders.encode() + b"\n")
    return process


async def _all(children: list[_Child], limit_s: float) -> None:
    tasks = [child.task for child in children if child.task is not None]
    if tasks:
        await asyncio.wait(tasks, timeout=limit_s)


async def _main(arguments: argparse.Namespace) -> None:
    for name in await asyncio.to_thread(end_leftovers, arguments.registry):
        _log.warning("ended %s, which a keeper that was killed has left", name)
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
    """Entry point; ``HELD_ELSEWHERE`` if there is a keeper for that state folder already."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="for sockets; short")
    parser.add_argument("--registry", type=Path, required=True, help="where it writes what it has")
    parser.add_argument("--logs", type=Path, required=True, help="folder for the zygote's log")
    parser.add_argument("--method", choices=["zygote", "spawn"], required=True)
    parser.add_argument("--identity", required=True, help="only a server that says the same stays")
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
    """Take note of the ends of what came to this process when its own parent ended."""
    end_s = time.monotonic() + limit_s
    with contextlib.suppress(ChildProcessError):
        while time.monotonic() < end_s:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(_POLL_S)


if __name__ == "__main__":
    sys.exit(main())
