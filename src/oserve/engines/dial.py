"""How a server reaches a keeper: it finds or starts its own, or calls one through a hatch."""

import asyncio
import contextlib
import fcntl
import hashlib
import logging
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec

from oserve import __version__
from oserve.core import Clock, HatchAddress, OServeError
from oserve.engines.clock import LiveClock
from oserve.engines.held_process import NodeLostError, no_start
from oserve.engines.keeper import HELD_ELSEWHERE
from oserve.engines.keeper_connection import KeeperConnection, LineStreams, LineTerms
from oserve.engines.keeper_messages import MAX_LINE_BYTES, KeeperHello
from oserve.engines.spawner import surroundings
from oserve.wire.hatch import KEEPER_NAME, open_hatch

_log = logging.getLogger("oserve.engines")

LOCAL_NODE = "local"
SILENCE_S = 5.0
"""The longest silence of a connection to another machine."""

_POLL_S = 0.05
_ENDING_POLL_S = 0.3
_REACH_LIMIT_S = 120.0
_GREETING_LIMIT_S = 5.0
# Variables that engines read; the others differ from one login to the next.
_PREFIXES = (
    *("VLLM_", "CUDA_", "NVIDIA_", "NCCL_", "HF_", "TORCH", "OMP_", "MKL_", "GLOO_"),
    *("PYTHON", "LD_", "TRITON_", "FLASHINFER_", "XDG_CACHE"),
)


class Dial(Protocol):
    """A way to one node's keeper.

    ``node``: its name. ``hatch``: where its sockets are, if on another machine. ``folder`` and
    ``logs``: known before the keeper is reached, if on this one.
    """

    node: str
    hatch: HatchAddress | None
    folder: Path | None
    logs: Path | None
    silence_s: float

    async def reach(self) -> KeeperConnection:
        """Connect. Raises ``OServeError`` if no fitting keeper can be reached."""
        ...

    async def closed(self) -> None:
        """Clear up after a keeper that has ended."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class KeeperPlace:
    """A keeper of this machine: how it is started and found.

    ``folder`` is for its socket and its engines, ``state_dir`` for its registry, ``log_dir`` for
    logs. ``detached``: it must outlive whatever ends the children of this process.
    """

    folder: Path
    state_dir: Path
    log_dir: Path
    method: str
    grace_s: float
    detached: bool = False

    @property
    def identity(self) -> str:
        """See ``identity_of``."""
        return identity_of(self.method, self.log_dir)

    def start(self) -> "subprocess.Popen[bytes]":
        """Start a keeper; it ends with ``HELD_ELSEWHERE`` if the state folder has one.

        Of a detached one, the process returned ends at once. Raises ``OServeError``.
        """
        self.log_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        registry = self.state_dir / "keeper.json"
        try:
            # No file of this process may stay open in one that outlives it.
            with (self.log_dir / "keeper.log").open("ab") as output:
                # asyncio's own objects kill their process when they are collected.
                return subprocess.Popen(
                    [
                        *(sys.executable, "-m", "oserve.engines.keeper"),
                        *("--folder", str(self.folder)),
                        *("--registry", str(registry.resolve())),
                        *("--logs", str(self.log_dir.resolve()), "--method", self.method),
                        *("--identity", self.identity, "--grace", str(self.grace_s)),
                        *(("--detach",) if self.detached else ()),
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env=surroundings(),
                    process_group=0,
                )
        except OSError as error:
            raise no_start(str(error)) from error


class LocalDial:
    """Finds the keeper of this machine, or starts one; see ``Dial``."""

    def __init__(self, place: KeeperPlace, *, node: str = LOCAL_NODE) -> None:
        self.node = node
        self.hatch: HatchAddress | None = None
        self.folder: Path | None = place.folder
        self.logs: Path | None = place.log_dir
        self.silence_s = 0.0
        self._place = place
        self._path = place.folder / KEEPER_NAME
        self._identity = place.identity
        self._started: subprocess.Popen[bytes] | None = None
        self._terms = LineTerms(node=node, place=str(self._path), local=True, differs=self._differs)

    def _differs(self, hello: KeeperHello) -> str:
        same = hello.identity == self._identity
        return "" if same else "it runs another version of OServe, or another environment"

    async def reach(self) -> KeeperConnection:
        """Wait for a keeper that is ending: for as long as its gateway processes have grace.

        A keeper of another version or environment is told to end everything first.
        """
        ours: subprocess.Popen[bytes] | None = None
        deadline_s = time.monotonic() + _REACH_LIMIT_S
        while time.monotonic() < deadline_s:
            line = await self._open()
            if line is not None and not line.difference:
                if ours is not None and self._place.detached:
                    await asyncio.to_thread(ours.wait)
                self._started = ours if ours and ours.pid == line.keeper.pid else None
                if ours is not None and self._place.detached:
                    # The keeper is a child of it, which has ended: this only reaps it.
                    await asyncio.to_thread(ours.wait)
                return line
            if line is not None:
                _log.warning(
                    "a keeper runs here whose processes cannot be taken over (%s): it is ended",
                    line.difference,
                )
                await line.close()
                continue
            status = ours.poll() if ours is not None else None
            if ours is None:
                ours = self._place.start()
            elif status == HELD_ELSEWHERE:
                ours = None
                await asyncio.sleep(_ENDING_POLL_S)
            elif status is not None and not (self._place.detached and status == 0):
                break
            await asyncio.sleep(_POLL_S)
        raise no_start(f"no keeper came up; see {self._place.log_dir / 'keeper.log'}")

    async def _open(self) -> KeeperConnection | None:
        try:
            streams = await asyncio.open_unix_connection(str(self._path), limit=MAX_LINE_BYTES)
        except OSError:
            return None
        return await KeeperConnection.greeted(streams, self._terms)

    async def closed(self) -> None:
        if self._started is not None:
            # It has ended: this only reaps it.
            await asyncio.to_thread(self._started.wait)


class HatchDial:
    """Calls the keeper of another node through its hatch, and never starts one; see ``Dial``.

    ``hatch`` may be replaced when the node tells another; the next call uses it. ``connect`` is
    for tests.
    """

    def __init__(
        self,
        node: str,
        hatch: HatchAddress,
        *,
        clock: Clock | None = None,
        silence_s: float = SILENCE_S,
        connect: Callable[[HatchAddress], Awaitable[LineStreams]] | None = None,
    ) -> None:
        self._connect = connect or _through_hatch
        self.node = node
        self.hatch: HatchAddress | None = hatch
        self.folder: Path | None = None
        self.logs: Path | None = None
        self.silence_s = silence_s
        self._terms = LineTerms(
            node=node,
            place=f"node {node}",
            local=False,
            differs=_other_version,
            silence_s=silence_s,
            clock=clock or LiveClock(),
        )

    async def reach(self) -> KeeperConnection:
        """Connect once. A keeper of another version is told to end; its agent starts another."""
        if self.hatch is None:
            raise NodeLostError(f"node {self.node} cannot be reached: it has told no hatch")
        line = None
        try:
            async with asyncio.timeout(_GREETING_LIMIT_S):
                streams = await self._connect(self.hatch)
                line = await KeeperConnection.greeted(streams, self._terms)
        except OSError as error:
            raise NodeLostError(
                f"node {self.node} cannot be reached: {str(error) or 'no answer'}"
            ) from None
        if line is None:
            raise NodeLostError(f"node {self.node} cannot be reached: its keeper is ending")
        if line.difference:
            difference = line.difference
            await line.close()
            raise NodeLostError(
                f"the keeper of node {self.node} is ended: {difference}",
                remedy="install the same version of OServe on every node",
            )
        return line

    async def closed(self) -> None:
        """Nothing of it is here."""


async def _through_hatch(hatch: HatchAddress) -> LineStreams:
    return await open_hatch(hatch, KEEPER_NAME, limit=MAX_LINE_BYTES)


def _other_version(hello: KeeperHello) -> str:
    if hello.node.oserve == __version__:
        return ""
    return f"it runs OServe {hello.node.oserve or 'of an unknown version'}, not {__version__}"


def identity_of(method: str, log_dir: Path) -> str:
    """A digest of what two servers must share for one to take over the other's processes.

    It covers the current folder, since names of models may be relative to it.
    """
    environment = sorted(item for item in surroundings().items() if item[0].startswith(_PREFIXES))
    folders = (str(Path.cwd()), str(log_dir.resolve()))
    facts = (__version__, sys.executable, method, folders, environment)
    return hashlib.blake2b(msgspec.json.encode(facts), digest_size=8).hexdigest()


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
