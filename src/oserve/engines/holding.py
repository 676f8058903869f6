"""The server's side of its keeper: find or start it, and have it hold processes.

Engines that ``HeldEngines`` starts outlive this process for as long as the keeper waits for another
server, which can take them over. If the keeper is killed, every process that it held ends, and the
next start makes another keeper.
"""

import asyncio
import contextlib
import fcntl
import hashlib
import logging
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from oserve import __version__
from oserve.core import OServeError
from oserve.engines.keeper import HELD_ELSEWHERE
from oserve.engines.keeper_connection import HeldProcess, KeeperConnection, no_start
from oserve.engines.keeper_messages import EngineStart, ProcessStart, ServerHello
from oserve.engines.registry import ProcessNote
from oserve.engines.spawner import surroundings

_log = logging.getLogger("oserve.engines")

_POLL_S = 0.05
_ENDING_POLL_S = 0.3
_REACH_LIMIT_S = 120.0
# Variables that engines read; the others differ from one login to the next.
_PREFIXES = (
    *("VLLM_", "CUDA_", "NVIDIA_", "NCCL_", "HF_", "TORCH", "OMP_", "MKL_", "GLOO_"),
    *("PYTHON", "LD_", "TRITON_", "FLASHINFER_", "XDG_CACHE"),
)


def private_name(state_dir: Path) -> str:
    """The name of the folder that ``private_folder`` makes: one per user and state folder."""
    owner = f"{os.getuid()} {state_dir.resolve()}".encode()
    return f"oserve-{hashlib.blake2b(owner, digest_size=5).hexdigest()}"


def private_folder(state_dir: Path) -> Path:
    """The folder for the sockets of a state folder's server; short, since socket paths must be.

    Later servers must find the same folder, so it does not follow the environment's temporary
    directory. Raises ``OServeError`` if other users can reach it.
    """
    folder = Path("/tmp") / private_name(state_dir)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if found.st_uid != os.getuid() or found.st_mode & 0o077 or folder.is_symlink():
        raise OServeError(
            "other users can reach this folder",
            place=str(folder),
            remedy="remove it, or set --state-dir",
        )
    return folder


def keeper_runs(state_dir: Path) -> bool:
    """Whether a keeper holds, or is ending, the processes of a server in that folder."""
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
    """A digest of what two servers must share for one to take over the other's processes.

    It covers the current folder, since names of models may be relative to it.
    """
    environment = sorted(item for item in surroundings().items() if item[0].startswith(_PREFIXES))
    folders = (str(Path.cwd()), str(log_dir.resolve()))
    facts = (__version__, sys.executable, method, folders, environment)
    return hashlib.blake2b(msgspec.json.encode(facts), digest_size=8).hexdigest()


class HeldEngines:
    """Starts engines and other processes that a keeper holds.

    ``folder`` is for its socket, ``state_dir`` for its registry, ``log_dir`` for its log.
    ``grace_s``: how long the keeper holds them when this process has ended.
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
        self._line: KeeperConnection | None = None
        self._lock = asyncio.Lock()
        self._started: subprocess.Popen[bytes] | None = None
        self._closed = False

    async def connect(self) -> None:
        """Find the previous server's keeper, or start one.

        A keeper of another version or environment is told to end everything first. Raises
        ``OServeError`` if no keeper can be reached.
        """
        await self._ensure()

    def engines(self) -> dict[str, HeldProcess]:
        """Engines that the keeper holds now, by name."""
        return {name: item for name, item in self._held().items() if item.entry.engine}

    def processes(self) -> dict[str, HeldProcess]:
        """Other processes that the keeper holds now, by name."""
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
        note: ProcessNote,
    ) -> HeldProcess:
        """Start an engine; see ``spawner.Launcher``. ``log_path`` is absolute."""
        line = await self._ensure()
        command = EngineStart(
            name=name,
            argv=list(argv),
            env=dict(env),
            cores=list(cores),
            log=str(log_path),
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
    ) -> HeldProcess:
        """Start another process; see ``keeper_messages.ProcessStart``."""
        line = await self._ensure()
        command = ProcessStart(
            name=name,
            argv=list(argv),
            first_line=first_line,
            log=str(log_path),
            grace_s=grace_s,
            note=note,
        )
        return await line.hold(command).begun()

    async def close(self) -> None:
        """End every process that the keeper holds, and the keeper."""
        self._closed = True
        async with self._lock:
            if self._line is not None:
                await self._line.close()
                self._line = None
            if self._started is not None:
                # It has ended: this only reaps it.
                await asyncio.to_thread(self._started.wait)

    async def _ensure(self) -> KeeperConnection:
        async with self._lock:
            if self._closed:
                raise no_start("the server is ending")
            if self._line is None or self._line.lost.done():
                self._line = await self._reach()
                self._line.send(ServerHello(grace_s=self._grace_s))
            return self._line

    async def _reach(self) -> KeeperConnection:
        """Wait for a keeper that is ending: for as long as its gateway processes have grace."""
        path = self._folder / "keeper.sock"
        ours: subprocess.Popen[bytes] | None = None
        deadline_s = time.monotonic() + _REACH_LIMIT_S
        while time.monotonic() < deadline_s:
            line = await KeeperConnection.open(path, self._identity)
            if line is not None and not line.difference:
                self._started = ours if ours and ours.pid == line.keeper.pid else None
                return line
            if line is not None:
                _log.warning(
                    "a keeper runs here whose processes cannot be taken over (%s): it is ended",
                    line.difference,
                )
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
        raise no_start(f"no keeper came up; see {self._log_dir / 'keeper.log'}")

    def _start(self) -> "subprocess.Popen[bytes]":
        self._log_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            # No file of this process may stay open in one that outlives it.
            with (self._log_dir / "keeper.log").open("ab") as output:
                # asyncio's own objects kill their process when they are collected.
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
            raise no_start(str(error)) from error
