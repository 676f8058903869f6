"""Parts that earlier servers have started: found one by one, taken over together or not at all."""

import asyncio
import contextlib
from collections.abc import Mapping

from oserve.core import OServeError, ReplicaPart, ReplicaSpec
from oserve.engines.held_process import HeldProcess
from oserve.engines.part_engines import PartsEngines
from oserve.engines.parts_process import PartsProcess


class PartsGathering:
    """The parts of one replica, while the keepers of its nodes are asked what they hold."""

    def __init__(self, spec: ReplicaSpec, engines: PartsEngines) -> None:
        self.spec = spec
        self.engines = engines
        self._found: dict[int, HeldProcess] = {}
        self._complete: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def is_complete(self) -> bool:
        """Whether all parts have been found."""
        return len(self._found) == len(self.engines.parts)

    def part_on(self, node: str) -> ReplicaPart | None:
        """The part of that node; ``None`` if it has none, as after it was given another name."""
        return next((part for part in self.engines.parts if part.node == node), None)

    def add(self, part: ReplicaPart, process: HeldProcess) -> None:
        """A part was found."""
        self._found[part.index] = process
        if self.is_complete and not self._complete.done():
            self._complete.set_result(None)

    def close(self) -> None:
        """No more will be found: give up unless all were."""
        if not self._complete.done():
            missing = [str(one) for one in self.engines.parts if one.index not in self._found]
            error = OServeError(
                f"not found any more: {', '.join(missing)}",
                place="engines",
                remedy="the replica is started again",
            )
            self._complete.set_exception(error)

    async def begun(self) -> PartsProcess:
        """All parts, once found. Raises ``OServeError`` if some are missing; then all end."""
        try:
            await asyncio.shield(self._complete)
        except BaseException:  # also when this is cancelled: no part is left behind
            for process in self._found.values():
                process.kill()
            for process in self._found.values():
                with contextlib.suppress(OServeError):
                    await process.wait()
            raise
        return PartsProcess(
            self.engines.parts, [self._found[part.index] for part in self.engines.parts]
        )


def finished(gathered: Mapping[str, PartsGathering]) -> tuple[list[str], list[str]]:
    """Close all; the replicas of which all parts were found, and the others, which end."""
    for one in gathered.values():
        one.close()
    whole = [name for name, one in gathered.items() if one.is_complete]
    return whole, [name for name in gathered if name not in whole]
