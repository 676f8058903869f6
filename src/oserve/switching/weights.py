"""The interfaces that move the weights of a switch: for a wave, and between engines."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from oserve.core import Endpoint
from oserve.switch.programme import ProgrammeStep
from oserve.switch.rank_order import RankOrder


class MoveError(Exception):
    """A transfer or a check failed; the message gives the reason."""


class WaveWeights(Protocol):
    """Loads and checks the new replicas of a wave: by engines, or modelled on a virtual clock.

    All methods raise MoveError if a retry may help, else TaskFailedError (``final``). A cancelled
    call leaves nothing running.
    """

    async def fill(self, step: ProgrammeStep, *, progress: Callable[[int], None]) -> None:
        """Move the weights of the wave; ``progress`` gets the bytes that have arrived."""
        ...

    async def check(self, step: ProgrammeStep) -> None:
        """Compare the weights at both ends, and generate once on each new replica."""
        ...

    async def release(self, replica: str) -> None:
        """Free the KV cache of a drained replica, which keeps its weights."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """Bytes over links and within devices; seconds of the slowest rank, and of loading."""

    size_bytes: int
    seconds: float
    take_up_s: float


class WeightMover(Protocol):
    """Moves weights between engines. See ``oserve.engines.mover.Mover``."""

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


class MoverFactory(Protocol):
    """Connects to the engines at these endpoints, by replica.

    ``node_of`` tells the node of a replica's rank.
    """

    def __call__(
        self, endpoints: Mapping[str, Endpoint], /, *, node_of: Callable[[str, int], str]
    ) -> WeightMover: ...
