"""What a replica's task needs of its engine's processes, on this machine or another."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from oserve.control.progress import Activity
from oserve.engines.logs import telling_line
from oserve.engines.spawner import EngineProcess


class WatchedProcess(EngineProcess, Protocol):
    """An engine's processes. If their node is lost, ``wait`` raises ``NodeLostError``."""

    async def activity(self) -> Activity | None:
        """What they do; ``None`` if that is unknown."""
        ...

    async def cause(self) -> str:
        """The line of their log that tells why they ended, or cannot serve; empty if unknown."""
        ...


class OwnProcess:
    """A ``WatchedProcess`` that this process has started; ``look``: see ``group_activity``."""

    def __init__(
        self,
        process: EngineProcess,
        log_path: Path,
        look: Callable[[int, Path], Activity | None],
    ) -> None:
        self._process = process
        self._log_path = log_path
        self._look = look

    @property
    def pid(self) -> int:
        return self._process.pid

    async def wait(self) -> int:
        return await self._process.wait()

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()

    async def activity(self) -> Activity | None:
        return self._look(self.pid, self._log_path)

    async def cause(self) -> str:
        return telling_line(self._log_path)
