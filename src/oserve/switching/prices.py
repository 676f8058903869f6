"""Prices of switches for the controller, leg by leg.

They come from the programme of the switch itself, so a decision prices what would be executed.
"""

from collections.abc import Sequence

from oserve.control.evaluation import Leg
from oserve.core import DeploymentPlan, OServeError, ReplicaSpec
from oserve.switch.programme import SwitchFacts, prepare_switch


class SwitchPrices:
    """``facts``: the facts for preparing switches, or the reason why weights cannot be moved."""

    def __init__(self, facts: SwitchFacts | str) -> None:
        self._facts = facts

    def use(self, facts: SwitchFacts | str) -> None:
        """Price switches from other facts from now on."""
        self._facts = facts

    def legs(
        self, old: Sequence[ReplicaSpec], new: Sequence[ReplicaSpec]
    ) -> tuple[Leg, ...] | None:
        """Return a leg per wave; ``None`` if these replicas must restart."""
        if isinstance(self._facts, str):
            return None
        try:
            programme = prepare_switch(self._facts, _bare(old), _bare(new))
        except OServeError:
            return None
        legs = []
        for step in programme.steps:
            wave, phases = step.wave, step.predicted

            def specs(names: Sequence[str]) -> tuple[ReplicaSpec, ...]:
                return tuple(programme.spec(name) for name in names)

            legs.append(
                Leg(
                    leaving=specs((*wave.release, *wave.stop)),
                    started=specs(wave.start),
                    retired=specs(wave.retire),
                    seconds=phases.until_commit_s - phases.room_s,
                )
            )
        return tuple(legs)


def _bare(replicas: Sequence[ReplicaSpec]) -> DeploymentPlan:
    """Return replicas as a plan that routes no requests."""
    return DeploymentPlan(
        id="", replicas=tuple(replicas), length_classes=(), routing_shares={}, planned_types=()
    )
