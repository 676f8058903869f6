"""What a switch asks of whatever moves weights between replicas."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from oserve.switch.orders import RankOrder


class MoveError(Exception):
    """A transfer or a check that failed; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """Bytes over links and inside devices; seconds of the slowest rank, and of taking it up."""

    size_bytes: int
    seconds: float
    take_up_s: float


class WeightMover(Protocol):
    """See ``oserve.engines.mover.Mover``."""

    async def layouts(self, replica: str) -> list[dict[str, tuple[int, ...]]]: ...

    async def move(
        self,
        name: str,
        orders: Sequence[RankOrder],
        *,
        limit_s: float,
        progress: Callable[[int], None],
    ) -> Moved: ...

    async def check(self, name: str, orders: Sequence[RankOrder], *, limit_s: float) -> int: ...

    async def generate(self, replica: str, model: str, *, limit_s: float) -> None: ...

    async def surprise(self, replica: str, model: str, *, limit_s: float) -> float: ...

    async def close(self) -> None: ...
