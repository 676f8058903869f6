"""Two ways to start an engine's processes, behind one protocol.

``ZygoteLauncher`` forks from a process that has imported vLLM; ``SpawnLauncher`` starts a new
interpreter. Either way no process of an engine outlives this one. It does not know replicas.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from oserve.core import OServeError
from oserve.engines.group import end_group, group_members, signal_group
from oserve.engines.process_messages import (
    EngineExited,
    EngineFork,
    EngineForked,
    ForkRefused,
    ZygoteEvent,
    ZygoteReady,
    encoded,
    supervisor_ready_of,
    zygote_event_of,
)

log = logging.getLogger(__name__)

_SERVER_MODULE = "oserve.engines.vllm_process"
_REPORT_LIMIT_S = 30.0
_IMPORT_LIMIT_S = 180.0
_CLOSE_LIMIT_S = 10.0
# The server's own settings, and a key that would make engines refuse OServe itself.
_WITHHELD_PREFIXES = ("OSERVE_", "VLLM_API_KEY")


class EngineProcess(Protocol):
    """One engine: a group of processes led by ``pid``."""

    @property
    def pid(self) -> int: ...

    async def wait(self) -> int:
        """Exit status (negative: the signal), once nothing of the group is left."""
        ...

    def terminate(self) -> None:
        """Ask every process of it to end."""
        ...

    def kill(self) -> None:
        """End every process of it now."""
        ...


class Launcher(Protocol):
    """``start`` raises ``OServeError`` when no process could be made."""

    async def prepare(self) -> None:
        """Do ahead what the first start would wait for."""
        ...

    async def start(
        self, argv: Sequence[str], env: Mapping[str, str], cores: Sequence[int], log_path: Path
    ) -> EngineProcess:
        """Run vLLM's API server with these arguments, extra variables and CPU cores."""
        ...

    async def close(self) -> None:
        """End the launcher and every engine that it started."""
        ...


class _Group:
    """What both ways share: signals to every process of the group."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def wait(self) -> int:
        return await asyncio.shield(self.ended)

    def terminate(self) -> None:
        if not self.ended.done():
            signal_group(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        if not self.ended.done():
            signal_group(self.pid, signal.SIGKILL, spare_tracker=True)

    def finish(self, status: int) -> None:
        if not self.ended.done():
            self.ended.set_result(status)


class SpawnLauncher:
    """Each engine is a new Python process under a small supervisor."""

    def __init__(self, server: Sequence[str] = (sys.executable, "-m", _SERVER_MODULE)) -> None:
        self._server = tuple(server)
        self._groups: dict[_Group, asyncio.Task[None]] = {}

    async def prepare(self) -> None:
        """See ``Launcher.prepare``; there is nothing to do."""

    async def start(
        self, argv: Sequence[str], env: Mapping[str, str], cores: Sequence[int], log_path: Path
    ) -> EngineProcess:
        """See ``Launcher.start``."""
        command = [
            *(sys.executable, "-m", "oserve.engines.supervisor"),
            *("--parent", str(os.getpid()), "--log", str(log_path)),
            *("--cores", ",".join(map(str, cores)), "--folder", env.get("TMPDIR", ""), "--"),
            *(*self._server, *argv),
        ]
        try:
            supervisor = await asyncio.create_subprocess_exec(
                *command,
                env=surroundings() | dict(env),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
            )
        except OSError as error:
            raise _no_start(str(error)) from error
        try:
            async with asyncio.timeout(_REPORT_LIMIT_S):
                # There is a stream, since standard output is a pipe.
                line = await supervisor.stdout.readline() if supervisor.stdout else b""
        except BaseException:  # also when this is cancelled: no supervisor is left behind
            with contextlib.suppress(ProcessLookupError):
                supervisor.terminate()
            raise
        ready = supervisor_ready_of(line)
        if ready is None:
            await supervisor.wait()
            raise _no_start("the supervisor ended before it started the engine")
        group = _Group(ready.pid)
        self._groups[group] = asyncio.create_task(self._watch(supervisor, group))
        return group

    async def _watch(self, supervisor: asyncio.subprocess.Process, group: _Group) -> None:
        status = await supervisor.wait()
        # A supervisor that was killed has not cleared up.
        if group_members(group.pid):
            await asyncio.to_thread(end_group, group.pid, grace_s=0)
        group.finish(128 - status if status > 128 else status)
        self._groups.pop(group, None)

    async def close(self) -> None:
        """See ``Launcher.close``."""
        tasks = list(self._groups.values())
        for group in list(self._groups):
            await asyncio.to_thread(end_group, group.pid, grace_s=2.0)
        await asyncio.gather(*tasks)


class ZygoteLauncher:
    """Engines are forked from one zygote, started on first use and again should it die.

    When it cannot come up, engines are started by ``fallback`` from then on, and the log says so.
    ``gpus``: whether engines that use GPUs are forked, too.
    """

    def __init__(
        self, *, log_path: Path, fallback: Launcher | None = None, gpus: bool = True
    ) -> None:
        self._log_path = log_path
        self._gpus = gpus
        self._fallback = fallback or SpawnLauncher()
        self._broken = False
        self._lock = asyncio.Lock()
        self._line: _ZygoteLine | None = None

    async def prepare(self) -> None:
        """See ``Launcher.prepare``; failing only means slower starts."""
        async with self._lock:
            await self._ensure()

    async def start(
        self, argv: Sequence[str], env: Mapping[str, str], cores: Sequence[int], log_path: Path
    ) -> EngineProcess:
        """See ``Launcher.start``."""
        if not self._gpus and env.get("CUDA_VISIBLE_DEVICES"):
            return await self._fallback.start(argv, env, cores, log_path)
        async with self._lock:
            line = await self._ensure()
        if line is None:
            return await self._fallback.start(argv, env, cores, log_path)
        return await line.start(argv, env, cores, log_path)

    async def _ensure(self) -> "_ZygoteLine | None":
        if self._broken:
            return None
        if self._line is None or self._line.lost.done():
            try:
                self._line = await _ZygoteLine.open(self._log_path)
            except OServeError as error:
                log.warning("engines will start slowly: %s", error)
                self._broken = True
                return None
        return self._line

    async def close(self) -> None:
        """See ``Launcher.close``."""
        async with self._lock:
            if self._line is not None:
                await self._line.close()
                self._line = None
        await self._fallback.close()


class _ZygoteLine:
    """The connection to one zygote process. ``lost`` is done when it has broken."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer
        self._count = 0
        self._asked: dict[str, asyncio.Future[_Group]] = {}
        self._groups: dict[str, _Group] = {}
        self.lost: asyncio.Task[None] = asyncio.create_task(self._listen())

    @classmethod
    async def open(cls, log_path: Path) -> "_ZygoteLine":
        """Start a zygote and wait until it has imported vLLM."""
        ours, theirs = socket.socketpair()
        try:
            with theirs, log_path.open("ab") as output:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "oserve.engines.zygote"),
                    *("--fd", str(theirs.fileno()), "--parent", str(os.getpid())),
                    env=surroundings()
                    | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
                    pass_fds=(theirs.fileno(),),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                )
        except OSError as error:
            ours.close()
            raise _no_start(str(error)) from error
        reader, writer = await asyncio.open_connection(sock=ours)
        try:
            async with asyncio.timeout(_IMPORT_LIMIT_S):
                greeting = await reader.readline()
        except BaseException as error:  # also when this is cancelled: no zygote is left behind
            writer.close()
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            if isinstance(error, TimeoutError):
                raise _no_start(f"no zygote after {_IMPORT_LIMIT_S:.0f} s") from error
            raise
        if not greeting:
            writer.close()
            status = await process.wait()
            raise _no_start(f"the zygote ended with status {status}; see {log_path}")
        return cls(process, reader, writer)

    async def start(
        self, argv: Sequence[str], env: Mapping[str, str], cores: Sequence[int], log_path: Path
    ) -> _Group:
        self._count += 1
        name = str(self._count)
        if self.lost.done():
            raise _no_start("the zygote ended")
        answer: asyncio.Future[_Group] = asyncio.get_running_loop().create_future()
        self._asked[name] = answer
        request = EngineFork(
            name=name,
            argv=list(argv),
            env=dict(env),
            cores=list(cores),
            threads=int(env.get("OMP_NUM_THREADS", "1")),
            log=str(log_path),
        )
        self._writer.write(encoded(request))
        return await answer

    async def _listen(self) -> None:
        try:
            while line := await self._reader.readline():
                self._handle(zygote_event_of(line))
        except OSError:
            pass
        except (msgspec.DecodeError, ValueError) as error:
            # Its engines cannot be told apart any more: it ends, and they with it.
            log.error("cannot read a message of the zygote, which is ended: %s", error)
        self._writer.close()
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        await self._process.wait()
        for answer in self._asked.values():
            if not answer.done():
                answer.set_exception(_no_start("the zygote ended"))
        for group in list(self._groups.values()):
            # Engines die with their zygote; this covers helpers that lost their parent.
            await asyncio.to_thread(end_group, group.pid, grace_s=0)
            group.finish(-signal.SIGKILL)
        self._groups.clear()

    def _handle(self, event: ZygoteEvent) -> None:
        match event:
            case EngineForked(name=name, pid=pid):
                group = self._groups[name] = _Group(pid)
                answer = self._asked.pop(name)
                if answer.cancelled():
                    group.kill()
                else:
                    answer.set_result(group)
            case EngineExited(name=name, status=status):
                self._groups.pop(name).finish(status)
            case ForkRefused(name=name, reason=reason):
                log.error("%s", reason)
                refused = self._asked.pop(name, None)
                if refused is not None and not refused.done():
                    refused.set_exception(_no_start(reason))
            case ZygoteReady():
                pass  # read before this line was made

    async def close(self) -> None:
        """Disconnect: the zygote ends its engines and itself."""
        with contextlib.suppress(OSError):
            if self._writer.can_write_eof():
                self._writer.write_eof()
        _, late = await asyncio.wait({self.lost}, timeout=_CLOSE_LIMIT_S)
        if late:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self.lost


def launcher_for(method: str, zygote_log: Path) -> Launcher:
    """The launcher of that name: ``zygote``, ``spawn``, or ``auto``, which spawns those on GPUs."""
    if method == "spawn":
        return SpawnLauncher()
    zygote_log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    return ZygoteLauncher(log_path=zygote_log, gpus=method != "auto")


def surroundings() -> dict[str, str]:
    """The environment that engines inherit from this process."""
    return {
        name: value for name, value in os.environ.items() if not name.startswith(_WITHHELD_PREFIXES)
    }


def _no_start(reason: str) -> OServeError:
    return OServeError(
        f"cannot start an engine: {reason}",
        place="engines",
        remedy="check that the engine packages are installed (oserve[cpu] or oserve[gpu])",
    )
