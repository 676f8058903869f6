"""Adapts the keepers of engines to the interface of the gateway supervisor."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from oserve.core import HatchAddress
from oserve.engines.adoption import end
from oserve.engines.held_process import HeldProcess, NodeLostError
from oserve.engines.holding import HeldEngines
from oserve.gateway.process.keeper import KeptProcess


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
        try:
            return await self._process.wait()
        except NodeLostError as error:
            raise ConnectionError(error.message) from None

    async def end(self, grace_s: float) -> None:
        try:
            await end(self._process, grace_s=grace_s)
        except NodeLostError as error:
            raise ConnectionError(error.message) from None

    async def cause(self) -> str:
        """The line of its log that tells why it ended."""
        return await self._process.cause()


class GatewayKeeper:
    """Implements ``gateway.process.keeper.NodeKeeper``; on this machine logs are in ``log_dir``."""

    def __init__(self, keeper: HeldEngines, log_dir: Path | None = None) -> None:
        self._keeper = keeper
        self._log_dir = log_dir

    @property
    def node(self) -> str:
        return self._keeper.node

    @property
    def hatch(self) -> HatchAddress | None:
        return self._keeper.hatch

    @property
    def folder(self) -> Path:
        return self._keeper.folder

    @property
    def python(self) -> str:
        return self._keeper.facts.python

    def processes(self) -> Mapping[str, KeptGatewayProcess]:
        held = self._keeper.processes()
        return {name: KeptGatewayProcess(process) for name, process in held.items()}

    async def start(
        self, name: str, argv: Sequence[str], stdin_line: str, *, grace_s: float, stamp: str
    ) -> KeptGatewayProcess:
        try:
            process = await self._keeper.hold(
                name, argv, stdin_line, self._log(name), grace_s, stamp
            )
        except NodeLostError as error:
            raise ConnectionError(error.message) from None
        return KeptGatewayProcess(process)

    async def failure(self, name: str, process: KeptProcess) -> str:
        cause = await process.cause() if isinstance(process, KeptGatewayProcess) else ""
        return f"{cause or 'its process ended'}; see {self._log(name)}"

    def _log(self, name: str) -> Path:
        return (self._log_dir or self._keeper.logs) / f"{name.replace(':', '-')}.log"
