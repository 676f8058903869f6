"""What the controller is told of switches: the way from replicas to others, leg by leg.

The same programme is made as for the switch itself, so that a decision weighs what would be done.
"""

from collections.abc import Callable, Sequence

from oserve.app.switching.model import movable_model
from oserve.app.switching.programme import SwitchFacts, prepare_switch
from oserve.config import Settings
from oserve.control.evaluation import Leg
from oserve.core import DeploymentPlan, Device, OServeError, ReplicaSpec
from oserve.engines.main_memory import available_memory_bytes
from oserve.switch.learned import LearnedPhases


def switch_facts(
    settings: Settings,
    devices: tuple[Device, ...],
    *,
    learned: LearnedPhases | None = None,
    available_bytes: Callable[[], int] = available_memory_bytes,
) -> SwitchFacts | str:
    """What switches that move weights are made from, or why weights cannot be moved here."""
    if settings.switch.method == "restart":
        return "switch.method says so"
    try:
        on_cpu = all(device.kind == "cpu" for device in devices)
        model = movable_model(settings, on_cpu=on_cpu)
    except OServeError as error:
        return error.message
    return SwitchFacts(
        model=model,
        devices=devices,
        settings=settings.engines,
        available_bytes=available_bytes,
        learned=learned or LearnedPhases(),
    )


class SwitchPrices:
    """``facts`` as ``switch_facts`` makes them."""

    def __init__(self, facts: SwitchFacts | str) -> None:
        self._facts = facts

    def legs(
        self, old: Sequence[ReplicaSpec], new: Sequence[ReplicaSpec]
    ) -> tuple[Leg, ...] | None:
        """Wave by wave; ``None`` where these replicas must be restarted."""
        if isinstance(self._facts, str):
            return None
        try:
            programme = prepare_switch(self._facts, _bare(old), _bare(new))
        except OServeError:
            return None
        legs = []
        for step in programme.steps:
            wave, phases = step.wave, step.predicted
            if wave.start and phases.transfer_s > 0 and not step.orders:
                return None

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
    """Replicas as a plan; nobody is routed by it."""
    return DeploymentPlan(
        id="", replicas=tuple(replicas), workload_types=(), routing_shares={}, types=()
    )
