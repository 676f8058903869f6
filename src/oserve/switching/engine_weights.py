"""Weights of a wave, moved and checked by engines."""

import asyncio
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

from oserve.control.cluster import Cluster
from oserve.core import OServeError, ReplicaPhase
from oserve.switch.layout import differences, shard_map
from oserve.switch.orders import rank_orders
from oserve.switch.programme import ProgrammeStep, SwitchProgramme
from oserve.switch.rank_order import RankOrder
from oserve.switching.tasks import TaskFailedError
from oserve.switching.weights import MoveError, MoverFactory, WeightMover

_log = logging.getLogger("oserve.switch")

_CHECK_S = 50.0
_ALIVE = {ReplicaPhase.STANDBY, ReplicaPhase.READY, ReplicaPhase.DRAINING}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineWeightFacts:
    """``model``: the name under which engines serve. ``mover`` connects to engines at endpoints.

    ``transfer_limit_s``: the lower bound on the deadline of a transfer. ``max_perplexity_rise``:
    the accepted relative rise of the perplexity if weights are converted during the transfer.
    """

    cluster: Cluster
    model: str
    mover: MoverFactory
    transfer_limit_s: float
    max_perplexity_rise: float


class EngineWeights:
    """See ``weights.WaveWeights``. Raises OServeError for an unsupported conversion."""

    def __init__(self, facts: EngineWeightFacts, switch: str, programme: SwitchProgramme) -> None:
        self._facts = facts
        self._switch = switch
        self._programme = programme
        self._orders = tuple(
            rank_orders(programme.architecture, step.transfer, step.sources, step.targets)
            for step in programme.steps
        )

    async def fill(self, step: ProgrammeStep, *, progress: Callable[[int], None]) -> None:
        """Compare layouts, then move. Raises MoveError or TaskFailedError."""
        mover = await self._connected(step)
        try:
            await self._compare_layouts(mover, step)
            moved = await mover.move(
                f"{self._switch}.{step.number}",
                self._orders[step.number],
                limit_s=step.limit_s(self._facts.transfer_limit_s),
                progress=progress,
            )
        finally:
            await mover.close()
        _log.info(
            "switch %s: %.0f MB moved in %.2f s, loaded in %.2f s",
            self._switch,
            moved.size_bytes / 1e6,
            moved.seconds,
            moved.take_up_s,
        )

    async def check(self, step: ProgrammeStep) -> None:
        """Compare checksums at both ends; each new replica generates once."""
        model = self._facts.model
        mover = await self._connected(step)
        try:
            await mover.check(self._switch, self._orders[step.number], limit_s=_CHECK_S)
            await asyncio.gather(
                *(mover.generate(name, model, limit_s=_CHECK_S) for name in step.wave.start)
            )
            for name in dict.fromkeys(one.replica for one in step.transfer.conversions):
                await self._compare_quality(mover, step, name)
        finally:
            await mover.close()

    async def release(self, replica: str) -> None:
        """Raises TaskFailedError, since no engine supports it."""
        raise TaskFailedError(f"{replica} cannot free its cache and keep its weights", final=True)

    async def _connected(self, step: ProgrammeStep) -> WeightMover:
        observation = await self._facts.cluster.observe()
        places = {}
        for replica in step.participants:
            state = observation.replica(replica)
            if state is None or state.phase not in _ALIVE:
                raise MoveError(f"{replica} has ended")
            places[replica] = state.endpoint
        return self._facts.mover(places, node_of=self._programme.node_of)

    async def _compare_layouts(self, mover: WeightMover, step: ProgrammeStep) -> None:
        for replica in step.participants:
            layout = self._programme.placed[replica].layout
            for rank, live in enumerate(await mover.layouts(replica)):
                try:
                    expected = shard_map(self._programme.architecture, layout, rank)
                except OServeError as error:
                    raise TaskFailedError(str(error), final=True) from None
                found = differences(expected, live)
                if found:
                    raise TaskFailedError(
                        f"{replica} rank {rank} has another weight layout than expected: "
                        + "; ".join(found[:3]),
                        final=True,
                    )

    async def _compare_quality(self, mover: WeightMover, step: ProgrammeStep, made: str) -> None:
        """Refuse converted weights that raise the perplexity too much."""
        facts = self._facts
        source = _source_of(self._orders[step.number], made)
        if source is None:
            return
        before, after = await asyncio.gather(
            mover.surprise(source, facts.model, limit_s=_CHECK_S),
            mover.surprise(made, facts.model, limit_s=_CHECK_S),
        )
        rise = math.expm1(after - before)
        _log.info(
            "switch %s: perplexity of %s is %+.2f %% of that of %s",
            self._switch,
            made,
            100 * rise,
            source,
        )
        if not rise <= facts.max_perplexity_rise:
            raise TaskFailedError(
                f"the converted weights of {made} raise perplexity by {100 * rise:.1f} %; "
                f"switch.max_perplexity_rise allows {100 * facts.max_perplexity_rise:.1f} %",
                final=True,
            )


def _source_of(orders: tuple[RankOrder, ...], made: str) -> str | None:
    """Return the first replica that sends to ``made``."""
    numbers = {peer for order in orders if order.replica == made for peer in order.receives}
    return next(
        (orders[number].replica for number in sorted(numbers) if orders[number].replica != made),
        None,
    )
