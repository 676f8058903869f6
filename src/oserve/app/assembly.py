"""Builds the parts of a server from its deployment."""

import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from oserve.config import backend_keys, plan_yaml
from oserve.control.loop import ControlLoop
from oserve.core import Clock, ReplicaState
from oserve.engines.cluster import EngineCluster
from oserve.engines.holding import HeldEngines
from oserve.engines.mover import Mover
from oserve.startup.deployment import ServerDeployment
from oserve.startup.folders import ServerFolders
from oserve.switch.programme import SwitchFacts
from oserve.switching.driver import SwitchOutcome
from oserve.switching.engine_weights import EngineWeightFacts, EngineWeights
from oserve.switching.journal import journal_folder
from oserve.switching.switcher import Switcher, SwitcherFacts


def engine_cluster(
    deployment: ServerDeployment,
    folders: ServerFolders,
    keeper: HeldEngines,
    clock: Clock,
    on_change: Callable[[ReplicaState], None],
    remote: Sequence[HeldEngines] = (),
) -> EngineCluster:
    """The engines of all nodes as a cluster; each change of a replica calls ``on_change``."""
    settings = deployment.settings
    return EngineCluster(
        deployment.devices,
        model=settings.model,
        served_model_name=deployment.models[0],
        run_dir=folders.run,
        clock=clock,
        settings=settings.engines,
        api_keys=backend_keys(deployment.plan),
        sized=deployment.sized,
        keeper=keeper,
        remote=remote,
        on_change=on_change,
    )


def plan_switcher(
    deployment: ServerDeployment,
    movable: SwitchFacts | str,
    cluster: EngineCluster,
    loop: ControlLoop,
    clock: Clock,
    *,
    settle: Callable[[SwitchOutcome], None],
    publish: Callable[[], Awaitable[None]],
) -> Switcher:
    """The switcher of the cluster; see ``SwitcherFacts`` for the arguments."""
    settings = deployment.settings
    weights = EngineWeightFacts(
        cluster=cluster,
        model=deployment.models[0],
        mover=partial(
            Mover,
            clock=clock,
            bytes_per_s=settings.switch.bytes_per_s,
            node_of=cluster.node_of,
        ),
        transfer_limit_s=settings.switch.transfer_limit_s,
        max_perplexity_rise=settings.switch.max_perplexity_rise,
    )
    return Switcher(
        SwitcherFacts(
            folder=journal_folder(settings.state_dir),
            movable=movable,
            cluster=cluster,
            loop=loop,
            clock=clock,
            settle=settle,
            publish=publish,
            weights=partial(EngineWeights, weights),
            plan_text=plan_yaml,
            unix_s=time.time,
            transfer_limit_s=settings.switch.transfer_limit_s,
        )
    )
