"""A server's side of its keeper: find it or start it, have it hold processes, take them up again.

Engines that ``HeldEngines`` starts outlive this process for as long as the keeper waits. Should the
keeper itself be killed, all that it held ends, and the next start makes another keeper.
"""

import asyncio
import contextlib
import fcntl
import hashlib
import logging
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from oserve import __version__
from oserve.core import OServeError
from oserve.engines import registry as lines
from oserve.engines.group import end_group
from oserve.engines.keeper import HELD_ELSEWHERE
from oserve.engines.registry import RegistryEntry
from oserve.engines.spawner import surroundings

_log = logging.getLogger("oserve.engines")

_POLL_S = 0.05
_ENDING_POLL_S = 0.3
_EXIT_LIMIT_S = 30.0
_REACH_LIMIT_S = 120.0
# The environment that engines go by; the rest of a shell's changes from one login to the next.
_PREFIXES = (
    *("VLLM_", "CUDA_", "NVIDIA_", "NCCL_", "HF_", "TORCH", "OMP_", "MKL_", "GLOO_"),
    *("PYTHON", "LD_", "TRITON_", "FLASHINFER_", "XDG_CACHE"),
)


def private_name(state_dir: Path) -> str:
    """Of the folder that ``private_folder`` makes; one for each user and state folder."""
    owner = f"{os.getuid()} {state_dir.resolve()}".encode()
    return f"oserve-{hashlib.blake2b(owner, digest_size=5).hexdigest()}"


def private_folder(state_dir: Path) -> Path:
    """Where the sockets of a state folder's server are; short, since socket paths must be.

    It is the same for whoever comes later, so the temporary directory of the environment does not
    count. Raises ``OServeError`` where somebody else has it.
    """
    folder = Path("/tmp") / private_name(state_dir)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if found.st_uid != os.getuid() or found.st_mode & 0o077 or folder.is_symlink():
        raise OServeError(
            "it is not ours alone", place=str(folder), remedy="remove it, or set --state-dir"
        )
    return folder


def keeper_runs(state_dir: Path) -> bool:
    """Whether a keeper holds what a server in that folder has left, or is ending it."""
    try:
        descriptor = os.open(state_dir / "keeper.lock", os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def identity_of(method: str, log_dir: Path) -> str:
    """What must be the same for one server to take up what another's keeper holds.

    The current folder is in it, since names of models may start from there.
    """
    environment = sorted(item for item in surroundings().items() if item[0].startswith(_PREFIXES))
    folders = (str(Path.cwd()), str(log_dir.resolve()))
    facts = (__version__, sys.executable, method, folders, environment)
    return hashlib.blake2b(msgspec.json.encode(facts), digest_size=8).hexdigest()


class HeldProcess:
    """One process that the keeper holds; an ``EngineProcess`` where it is an engine."""

    def __init__(self, line: "_Line", entry: RegistryEntry) -> None:
        loop = asyncio.get_running_loop()
        self._line = line
        self.entry = entry
        self.ended: asyncio.Future[int] = loop.create_future()
        self._begun: asyncio.Future[int] = loop.create_future()
        if entry.pid:
            self._begun.set_result(entry.pid)

    @property
    def pid(self) -> int:
        return self.entry.pid

    async def begun(self) -> "HeldProcess":
        """Wait until it is there. Raises ``OServeError`` where it could not be started.

        If this is cancelled before, it is ended, and that is waited for.
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

    def mark(self, note: Any) -> None:
        """Replace its note."""
        self.entry.note = note
        if not self.ended.done():
            self._line.send(lines.Mark(name=self.entry.name, note=note))

    def _signal(self, number: int) -> None:
        if not self.ended.done():
            self.entry.ending = True
            self._line.send(lines.Signal(name=self.entry.name, number=number))

    # -- what the line hears --------------------------------------------------------------------
    def heard(self, message: lines.Started | lines.Refused | lines.Ended) -> None:
        match message:
            case lines.Started(pid=pid):
                self.entry.pid = pid
                if not self._begun.done():
                    self._begun.set_result(pid)
            case lines.Refused(reason=reason):
                if not self._begun.done():
                    self._begun.set_exception(_no_start(reason))
                    self._begun.exception()
                self._finish(-signal.SIGKILL)
            case lines.Ended(status=status):
                self._finish(status)

    def _finish(self, status: int) -> None:
        if not self.ended.done():
            self.ended.set_result(status)


class _Line:
    """The connection to one keeper."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, hello: lines.Hello
    ) -> None:
        self._reader = reader
        self._writer = writer
        self.hello = hello
        self.held = {entry.name: HeldProcess(self, entry) for entry in hello.held}
        self._decoder = msgspec.json.Decoder(lines.Tell)
        self.lost: asyncio.Task[None] = asyncio.create_task(self._listen())

    @classmethod
    async def open(cls, path: Path) -> "_Line | None":
        """``None`` where no keeper answers."""
        try:
            reader, writer = await asyncio.open_unix_connection(
                str(path), limit=lines.MAX_LINE_BYTES
            )
            hello = await reader.readline()
            return cls(reader, writer, msgspec.json.decode(hello, type=lines.Hello))
        except (OSError, msgspec.DecodeError):
            return None

    def send(self, ask: lines.Ask) -> None:
        if not self.lost.done():
            self._writer.write(msgspec.json.encode(ask) + b"\n")

    def hold(self, ask: lines.Start | lines.Hold) -> HeldProcess:
        engine = isinstance(ask, lines.Start)
        entry = RegistryEntry(name=ask.name, engine=engine, log=ask.log, note=ask.note)
        process = self.held[ask.name] = HeldProcess(self, entry)
        self.send(ask)
        return process

    async def close(self) -> None:
        """Have the keeper end everything and itself; returns when it is gone."""
        self.send(lines.Close())
        await asyncio.wait({self.lost}, timeout=_EXIT_LIMIT_S)
        if self.hello.pid == os.getpid():
            return
        gone = await asyncio.to_thread(_await_exit, self.hello.pid, _EXIT_LIMIT_S)
        if not gone:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.hello.pid, signal.SIGKILL)
        await self.lost

    async def _listen(self) -> None:
        with contextlib.suppress(OSError, ValueError, msgspec.DecodeError):
            while line := await self._reader.readline():
                message = self._decoder.decode(line)
                if isinstance(message, lines.Hello) or message.name not in self.held:
                    continue
                self.held[message.name].heard(message)
                if not isinstance(message, lines.Started):
                    del self.held[message.name]
        self._writer.close()
        for process in list(self.held.values()):
            # Everything ends with its keeper; this covers helpers that lost their parent.
            if process.entry.engine and process.pid:
                await asyncio.to_thread(end_group, process.pid, grace_s=0)
            reason = lines.Refused(name=process.entry.name, reason="the keeper ended")
            process.heard(reason)
        self.held.clear()


class HeldEngines:
    """A launcher whose engines a keeper holds; it holds other processes too.

    ``folder`` is for its socket, ``state_dir`` for its registry, ``log_dir`` for its log.
    ``grace_s``: for how long all is held when this process is gone.
    """

    def __init__(
        self, *, folder: Path, state_dir: Path, log_dir: Path, method: str, grace_s: float
    ) -> None:
        self._folder = folder
        self._registry = state_dir / "keeper.json"
        self._log_dir = log_dir
        self._method = method
        self._grace_s = grace_s
        self._identity = identity_of(method, log_dir)
        self._line: _Line | None = None
        self._lock = asyncio.Lock()
        self._started: subprocess.Popen[bytes] | None = None
        self._closed = False

    async def connect(self) -> None:
        """Find the keeper of the server before this one, or start one.

        One of another version or environment is told to end everything first.
        """
        await self._ensure()

    def engines(self) -> dict[str, HeldProcess]:
        """Engines that the keeper holds now, by name."""
        return {name: item for name, item in self._held().items() if item.entry.engine}

    def processes(self) -> dict[str, HeldProcess]:
        """What else it holds."""
        return {name: item for name, item in self._held().items() if not item.entry.engine}

    def _held(self) -> dict[str, HeldProcess]:
        return self._line.held if self._line is not None else {}

    async def launch(
        self,
        name: str,
        argv: Sequence[str],
        env: Mapping[str, str],
        cores: Sequence[int],
        log_path: Path,
        note: Any,
    ) -> HeldProcess:
        """Start an engine; see ``spawner.Launcher``. ``log_path`` is absolute."""
        line = await self._ensure()
        ask = lines.Start(
            name=name,
            argv=list(argv),
            env=dict(env),
            cores=list(cores),
            log=str(log_path),
            note=note,
        )
        return await line.hold(ask).begun()

    async def hold(
        self, name: str, argv: Sequence[str], orders: str, log_path: Path, grace_s: float, note: Any
    ) -> HeldProcess:
        """Start another process; see ``registry.Hold``."""
        line = await self._ensure()
        ask = lines.Hold(
            name=name,
            argv=list(argv),
            orders=orders,
            log=str(log_path),
            grace_s=grace_s,
            note=note,
        )
        return await line.hold(ask).begun()

    async def close(self) -> None:
        """End everything that is held, and the keeper."""
        self._closed = True
        async with self._lock:
            if self._line is not None:
                await self._line.close()
                self._line = None
            if self._started is not None:
                # It has ended: this only takes note of it.
                await asyncio.to_thread(self._started.wait)

    async def _ensure(self) -> _Line:
        async with self._lock:
            if self._closed:
                raise _no_start("the server is ending")
            if self._line is None or self._line.lost.done():
                self._line = await self._reach()
                self._line.send(lines.Greet(grace_s=self._grace_s))
            return self._line

    async def _reach(self) -> _Line:
        """One that ends is waited for: as long as its gateway processes have grace."""
        path = self._folder / "keeper.sock"
        ours: subprocess.Popen[bytes] | None = None
        deadline_s = time.monotonic() + _REACH_LIMIT_S
        while time.monotonic() < deadline_s:
            line = await _Line.open(path)
            if line is not None and line.hello.identity == self._identity:
                self._started = ours if ours and ours.pid == line.hello.pid else None
                return line
            if line is not None:
                _log.warning("what runs is of another version or environment: it is ended first")
                await line.close()
                continue
            if ours is None:
                ours = self._start()
            elif ours.poll() == HELD_ELSEWHERE:
                ours = None
                await asyncio.sleep(_ENDING_POLL_S)
            elif ours.poll() is not None:
                break
            await asyncio.sleep(_POLL_S)
        raise _no_start(f"no keeper came up; see {self._log_dir / 'keeper.log'}")

    def _start(self) -> "subprocess.Popen[bytes]":
        self._log_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            # Nothing of this process' may stay open in one that outlives it.
            with (self._log_dir / "keeper.log").open("ab") as output:
                # Not one of asyncio's: those kill their process when they are thrown away.
                return subprocess.Popen(
                    [
                        *(sys.executable, "-m", "oserve.engines.keeper"),
                        *("--folder", str(self._folder)),
                        *("--registry", str(self._registry.resolve())),
                        *("--logs", str(self._log_dir.resolve()), "--method", self._method),
                        *("--identity", self._identity, "--grace", str(self._grace_s)),
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env=surroundings(),
                    process_group=0,
                )
        except OSError as error:
            raise _no_start(str(error)) from error


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


def _no_start(reason: str) -> OServeError:
    return OServeError(
        f"cannot start a process: {reason}",
        place="engines",
        remedy="read the log; check that the engine packages are installed (oserve[cpu] or [gpu])",
    )
