"""A deployment that grows: nodes that join a running server, and links that are known better.

The plan request is made again for all devices, with the same workload types, so that planner,
ladder, switches and what is saved follow the nodes that are known. What runs is left alone: the
controller decides what becomes of the new devices.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace

from oserve.core import Clock, OServeError
from oserve.engines.processor import plain_precisions
from oserve.nodes.due_work import DueWork
from oserve.perf.device import Link, find_link
from oserve.plan.planning import PlanRequest
from oserve.startup.deployment import ServerDeployment, fingerprint_of
from oserve.startup.first_plan import StepTimes, find_step_times, plan_request_for
from oserve.startup.node_fleet import NodeFleet, NodesFound
from oserve.startup.sizing import find_memory_check, fit_request
from oserve.startup.switch_facts import switch_facts
from oserve.switch.learned import LearnedPhases
from oserve.switch.programme import SwitchFacts

_log = logging.getLogger("oserve.nodes")

# Several nodes come up together.
_SETTLE_S = 2.0
_AGAIN_S = 30.0
# Of bandwidth or latency: measurements differ by as much without a cause.
_SAME = 1.3


class ClusterGrowth:
    """Tells ``renewed`` of a deployment for all nodes of ``fleet`` whenever there is more to know.

    ``notice`` is called when a node has joined or links were measured.
    """

    def __init__(
        self,
        deployment: ServerDeployment,
        fleet: NodeFleet,
        clock: Clock,
        renewed: Callable[[ServerDeployment], Awaitable[None]],
    ) -> None:
        self.deployment = deployment
        self._fleet = fleet
        self._renewed = renewed
        # After a fault the plan is that for the nodes before.
        self._following = DueWork(
            self._follow,
            clock,
            fault="the plan does not follow the nodes",
            again_s=_AGAIN_S,
            settle_s=_SETTLE_S,
        )

    def notice(self) -> None:
        """There may be more to know."""
        self._following.refresh()

    async def run(self) -> None:
        """Follow until cancelled."""
        await self._following.run()

    async def _follow(self) -> None:
        found = self._fleet.found(self.deployment.asked)
        grown = await asyncio.to_thread(grown_to, self.deployment, found)
        if grown is None:
            return
        more = len(grown.devices) - len(self.deployment.devices)
        await self._renewed(grown)
        # Not before: what has failed is tried again.
        self.deployment = grown
        _log.info(
            "planning for %d devices (%d more), with the link %s between nodes",
            len(grown.devices),
            more,
            network_words(grown.network),
        )


def movable_weights(
    deployment: ServerDeployment, fleet: NodeFleet | None, learned: LearnedPhases
) -> SwitchFacts | str:
    """The facts for the switches of a server; see ``switch_facts``."""
    return switch_facts(
        deployment.settings,
        deployment.devices,
        network=deployment.network,
        measured=dict if fleet is None else fleet.links.rates,
        learned=learned,
    )


def grown_to(deployment: ServerDeployment, nodes: NodesFound) -> ServerDeployment | None:
    """The deployment for the nodes found; ``None`` if nothing that matters is new.

    Where no plan can be made for all devices together, the request stays as it is.
    """
    known = {device.id for device in deployment.devices}
    fresh = [device for device in nodes.devices if device.id not in known]
    request = deployment.plan_request
    spans = request is not None and any(
        shape.pipeline_parallel_size > 1 for shape in request.shapes
    )
    if not fresh and not (spans and _differs(deployment.network, nodes.network)):
        return None
    if request is not None:
        try:
            request = _request(deployment, request, nodes)
        except OServeError as error:
            _log.warning("no plan for all devices together: %s", error)
    devices, settings = nodes.devices, deployment.asked
    plain = plain_precisions(devices, nodes.processor)
    return replace(
        deployment,
        devices=devices,
        plan_request=request,
        network=nodes.network,
        fingerprint=fingerprint_of(settings, devices, plain),
    )


def _request(deployment: ServerDeployment, request: PlanRequest, nodes: NodesFound) -> PlanRequest:
    """The same request for the nodes found. Raises OServeError."""
    settings, devices = deployment.settings, nodes.devices
    times = find_step_times(settings, devices, nodes.network)
    if not isinstance(times, StepTimes):
        raise OServeError(times.reason, place="planning", remedy="see docs/planning.md")
    plain = plain_precisions(devices, nodes.processor)
    fresh = plan_request_for(settings, devices, times, plain, demand=request.demand)
    return fit_request(find_memory_check(settings, devices), fresh, ())[1]


def _differs(one: str | Link, other: str | Link) -> bool:
    """Whether plans may differ between two networks."""
    before, after = _link(one), _link(other)
    pairs = (before.bandwidth, after.bandwidth), (before.latency_s, after.latency_s)
    return any(max(pair) > _SAME * min(pair) for pair in pairs)


def _link(network: str | Link) -> Link:
    return network if isinstance(network, Link) else find_link(network)


def network_words(network: str | Link) -> str:
    """A link for the log."""
    link = _link(network)
    return f"{link.name} ({link.bandwidth / 1e6:,.0f} MB/s, {1e3 * link.latency_s:.2f} ms)"
