"""Adapts the keeper of engines to the interface of the gateway supervisor."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from oserve.engines.adoption import end
from oserve.engines.held_process import HeldProcess
from oserve.engines.holding import HeldEngines
from oserve.engines.logs import telling_line


class KeptGatewayProcess:
    """Implements ``gateway.process.keeper.KeptProcess``."""

    def __init__(self, process: HeldProcess) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def stamp(self) -> str:
        note = self._process.entry.note
        return note if isinstance(note, str) else ""

    @property
    def ending(self) -> bool:
        return self._process.entry.ending

    async def wait(self) -> int:
        return await self._process.wait()

    async def end(self, grace_s: float) -> None:
        await end(self._process, grace_s=grace_s)


class GatewayKeeper:
    """Implements ``gateway.process.keeper.ProcessKeeper``; logs are in ``log_dir``."""

    def __init__(self, keeper: HeldEngines, log_dir: Path) -> None:
        self._keeper = keeper
        self._log_dir = log_dir

    def processes(self) -> Mapping[str, KeptGatewayProcess]:
        held = self._keeper.processes()
        return {name: KeptGatewayProcess(process) for name, process in held.items()}

    async def start(
        self, name: str, argv: Sequence[str], stdin_line: str, *, grace_s: float, stamp: str
    ) -> KeptGatewayProcess:
        log_path = self._log_dir / f"{_log_name(name)}.log"
        process = await self._keeper.hold(name, argv, stdin_line, log_path, grace_s, stamp)
        return KeptGatewayProcess(process)

    def failure(self, name: str) -> str:
        log_path = self._log_dir / f"{_log_name(name)}.log"
        return f"{telling_line(log_path) or 'its process ended'}; see {log_path}"


def _log_name(name: str) -> str:
    return name.replace(":", "-")
