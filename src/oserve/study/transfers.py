"""Switches of a scene whose replicas get their weights from each other.

The switcher, its waves and its transactions are those of a server. Weights move over idle links, at
the share of their bandwidth and with the constants of the scene's ``SwitchCosts``. Two things are
taken to be better than on servers of today: engines can free their KV cache and keep their weights
(and stand by without a cache), and engines keep weights of every precision as they were loaded.
"""

import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from oserve.control.loop import ControlLoop
from oserve.core import DeploymentPlan, OServeError, Precision, VirtualClock
from oserve.perf.source import RooflineSource
from oserve.sim.fleet_cluster import FleetCluster
from oserve.sim.modelled_weights import ModelledWeightFacts, ModelledWeights
from oserve.sim.phases import Phases
from oserve.study.scene import Scene
from oserve.switch.costs import SwitchCosts
from oserve.switch.journal import JournalLine
from oserve.switch.layout import architecture_of
from oserve.switch.model import MovableModel
from oserve.switch.precision import format_of
from oserve.switch.programme import SwitchFacts
from oserve.switching.driver import SwitchOutcome
from oserve.switching.switcher import Switcher, SwitcherFacts, at_once

# A wave looks at the cluster so often; a server does each 0.1 s.
_POLL_S = 0.25
_TRANSFER_LIMIT_S = 60.0


class ForgetfulJournal:
    """A journal that keeps nothing: a simulated switch never restarts."""

    def write(self, line: JournalLine) -> None:
        """Take a line."""

    def close(self) -> None:
        """No more lines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneSwitching:
    """What a run connects its switcher to; see ``SwitcherFacts``."""

    scene: Scene
    cluster: FleetCluster
    loop: ControlLoop
    clock: VirtualClock
    settle: Callable[[SwitchOutcome], None]
    publish: Callable[[], Awaitable[None]]


def scene_switcher(switching: SceneSwitching) -> Switcher:
    """Return the switcher of a run."""
    scene, clock = switching.scene, switching.clock
    weights = ModelledWeightFacts(
        cluster=switching.cluster,
        clock=clock,
        costs=scene.switch_costs,
        draws_fault=switching.cluster.draws_fault,
        failed_transfer=switching.cluster.faults.failed_transfer,
    )
    return Switcher(
        SwitcherFacts(
            folder=Path(),
            movable=scene_switch_facts(scene),
            cluster=switching.cluster,
            loop=switching.loop,
            clock=clock,
            settle=switching.settle,
            publish=switching.publish,
            weights=partial(ModelledWeights, weights),
            plan_text=_plan_id,
            unix_s=clock.now,
            transfer_limit_s=_TRANSFER_LIMIT_S,
            journal=_journal,
            compute=at_once,
            poll_s=_POLL_S,
        )
    )


def scene_switch_facts(scene: Scene) -> SwitchFacts | str:
    """Return what switches of a scene are prepared from, or why weights cannot be moved."""
    source = scene.source
    if not isinstance(source, RooflineSource):
        return "the step times tell nothing of the model's weights"
    try:
        architecture = architecture_of(source.model)
    except OServeError as error:
        return error.message
    formats = {precision: format_of(precision) for precision in Precision}
    return SwitchFacts(
        model=MovableModel(architecture=architecture, formats=formats),
        devices=scene.devices,
        kv_cache_memory_bytes=0,
        available_bytes=lambda: sys.maxsize,
        releases_cache=True,
        network=scene.network,
        costs=scene.switch_costs,
    )


def transfer_phases(scene: Scene) -> Phases:
    """Return the phases of a scene's starts, with those of replicas on standby."""
    costs = scene.switch_costs
    return replace(
        scene.phases,
        standby_s=costs.engine_start_s,
        further_standby_s=costs.further_start_s,
        stop_s=max(scene.phases.stop_s, costs.room_s),
    )


def usual_start_s(costs: SwitchCosts) -> float:
    """Return what a start is taken to need before one was seen, a second of it for copying."""
    return costs.engine_start_s + costs.join_s + 1.0 + costs.verify_s + costs.commit_s


def _plan_id(plan: DeploymentPlan) -> str:
    return plan.id


def _journal(path: Path) -> ForgetfulJournal:
    del path
    return ForgetfulJournal()
