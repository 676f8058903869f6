"""The processes of a keeper, as it starts and signals them."""

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

from oserve import __version__
from oserve.core import OServeError
from oserve.engines.group import CACHES_FOLDER, boot_id
from oserve.engines.keeper_messages import EngineStart, NodeFacts, ProcessStart
from oserve.engines.logs import rotate_log
from oserve.engines.patches import engine_package
from oserve.engines.processor import find_processor
from oserve.engines.registry import RegistryEntry
from oserve.engines.spawner import EngineProcess, Launcher


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
class KeptChild:
    """``process`` is ``None`` while it starts; ``task`` lives from its start to its end."""

    entry: RegistryEntry
    grace_s: float = 0.0
    process: EngineProcess | None = None
    task: asyncio.Task[None] | None = None

    @classmethod
    def of(cls, command: EngineStart | ProcessStart) -> "KeptChild":
        """The child that a command asks for, before it starts."""
        entry = RegistryEntry(
            name=command.name,
            engine=isinstance(command, EngineStart),
            log=command.log,
            note=command.note,
        )
        match command:
            case EngineStart():
                entry.folder = command.folder or command.env.get("TMPDIR", "")
                return cls(entry)
            case ProcessStart():
                entry.stays = command.stays
                return cls(entry, grace_s=command.grace_s)

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


async def start_child(command: EngineStart | ProcessStart, launcher: Launcher) -> EngineProcess:
    """Start a child with its files. Raises ``OServeError`` or ``OSError``."""
    if command.log:
        rotate_log(Path(command.log))
    match command:
        case EngineStart():
            check_model(command.model)
            if command.folder:
                make_engine_folder(Path(command.folder))
            return await launcher.start(command.argv, command.env, command.cores, Path(command.log))
        case ProcessStart():
            return await _start_process(command)


async def _start_process(command: ProcessStart) -> EngineProcess:
    with open(command.log, "ab") as output:  # noqa: ASYNC230
        process = await asyncio.create_subprocess_exec(
            *command.argv, stdin=asyncio.subprocess.PIPE, stdout=output, stderr=output
        )
    if process.stdin is not None:  # which a pipe for standard input ensures
        process.stdin.write(command.first_line.encode() + b"\n")
    return _PlainProcess(process)


def check_model(folder: str) -> None:
    """Check that this node has the model's files. Raises ``OServeError``.

    vLLM would take the name of a missing folder for one of a model hub.
    """
    if folder and not (Path(folder) / "config.json").is_file():
        host = socket.gethostname()
        raise OServeError(
            f"node {host} has no model at {folder}",
            place=f"node {host}",
            remedy="copy the model's files there, or mount the same folder on every node",
        )


def make_engine_folder(folder: Path) -> None:
    """Make the folder of a new engine, and the one for caches beside it. Raises ``OSError``."""
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.mkdir(mode=0o700)
    (folder.parent / CACHES_FOLDER).mkdir(mode=0o700, exist_ok=True)


def remove_engine_folder(folder: str) -> None:
    """Remove the folder of an engine that has ended."""
    if folder:
        shutil.rmtree(folder, ignore_errors=True)


async def wait_all(children: list[KeptChild], limit_s: float) -> None:
    """Wait until they have ended, for at most so long."""
    tasks = [child.task for child in children if child.task is not None]
    if tasks:
        await asyncio.wait(tasks, timeout=limit_s)


def find_node_facts(folder: Path, logs: Path) -> NodeFacts:
    """What this machine and environment are."""
    engine = engine_package()
    return NodeFacts(
        host=socket.gethostname(),
        oserve=__version__,
        engine=engine[1] if engine is not None else "",
        boot=boot_id(),
        folder=str(folder),
        logs=os.path.abspath(logs),
        python=sys.executable,
        bf16=find_processor().has_bf16,
        rdma=_has_rdma(Path("/sys/class/infiniband")),
    )


def _has_rdma(folder: Path) -> bool:
    """Whether the kernel lists devices there."""
    try:
        return any(folder.iterdir())
    except OSError:
        return False
