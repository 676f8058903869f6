"""Weights of a wave on simulated replicas, with modelled transfer times.

The transfer plan is the one that engines would execute; it takes its modelled seconds on the
cluster's clock.
"""

from collections.abc import Callable
from dataclasses import dataclass

from oserve.control.cluster import Cluster
from oserve.core import Clock
from oserve.switch.costs import SwitchCosts, transfer_s, verify_s
from oserve.switch.programme import ProgrammeStep, SwitchProgramme
from oserve.switching.weights import MoveError

# How often a transfer checks whether a participating replica has ended.
_LOOK_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelledWeightFacts:
    """``draws_fault`` draws whether a fault of the given probability occurs.

    ``failed_transfer``: the probability that a transfer, or a check, fails halfway.
    """

    cluster: Cluster
    clock: Clock
    costs: SwitchCosts
    draws_fault: Callable[[float], bool] = lambda _chance: False
    failed_transfer: float = 0.0


class ModelledWeights:
    """See ``switching.weights.WaveWeights``."""

    def __init__(self, facts: ModelledWeightFacts, switch: str, programme: SwitchProgramme) -> None:
        del switch, programme
        self._facts = facts

    async def fill(self, step: ProgrammeStep, *, progress: Callable[[int], None]) -> None:
        """Wait the seconds of the transfer. Raises MoveError."""
        await self._pass(step, transfer_s(step.transfer, self._facts.costs))
        progress(step.moved_bytes)

    async def check(self, step: ProgrammeStep) -> None:
        """Wait the seconds of the verification. Raises MoveError."""
        await self._pass(step, verify_s(step.transfer, self._facts.costs))

    async def release(self, replica: str) -> None:
        """Wait the seconds of freeing a cache."""
        del replica
        await self._facts.clock.sleep(self._facts.costs.room_s)

    async def _pass(self, step: ProgrammeStep, seconds: float) -> None:
        facts = self._facts
        fails = facts.draws_fault(facts.failed_transfer)
        end_s = facts.clock.now() + (seconds / 2 if fails else seconds)
        while True:
            observation = await facts.cluster.observe()
            for replica in step.participants:
                if observation.replica(replica) is None:
                    raise MoveError(f"{replica} has ended")
            left_s = end_s - facts.clock.now()
            if left_s <= 0.0:
                break
            await facts.clock.sleep(min(left_s, _LOOK_S))
        if fails:
            raise MoveError("the transfer failed")
