"""Publishes the cluster: routing tables and status to gateways, phases to the operator."""

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from oserve import __version__
from oserve.app.controller import ControllerService
from oserve.config.tiers import default_tier, tiers_of
from oserve.control.dispatch.table import RoutingTable
from oserve.control.reconcile import ReconcilePolicy
from oserve.control.routing import routing_table
from oserve.control.status import gauges, status_document, summary, tier_rows
from oserve.core import DeploymentPlan, Observation
from oserve.engines.energy import EnergyMeter
from oserve.evaluate.background_tuning import BackgroundTuning, ConstantsAsGiven
from oserve.gateway.process.states import gateway_documents, gateway_gauges
from oserve.gateway.process.supervisor import GatewaySupervisor
from oserve.gateway.snapshot import ClusterSnapshot
from oserve.startup.deployment import ServerDeployment
from oserve.switching.report import SwitchTally


class StatusPublisher:
    """Publishes observations; ``changed`` gets a line whenever a replica's phase changes.

    ``nodes``: what is known of each node beyond its state.
    """

    def __init__(
        self,
        deployment: ServerDeployment,
        gateway: GatewaySupervisor,
        controller: ControllerService | None,
        tuning: BackgroundTuning | ConstantsAsGiven,
        policy: ReconcilePolicy,
        changed: Callable[[str], None],
        nodes: Callable[[], Mapping[str, Mapping[str, Any]]] = dict,
    ) -> None:
        self._nodes = nodes
        self._deployment = deployment
        self._gateway = gateway
        self._controller = controller
        self._tuning = tuning
        self._policy = policy
        self._changed = changed
        self._ordered = deployment.settings.gateway.order.policy == "priority"
        self._line = ""
        self._tiers = tiers_of(deployment.settings)
        self._default_tier = default_tier(deployment.settings)
        self._costs = deployment.costs if controller is None else controller.costs
        self._energy = EnergyMeter(deployment.devices, self._costs)
        self._switches = SwitchTally()

    def publish(
        self,
        plan: DeploymentPlan,
        observation: Observation,
        lost: Mapping[str, str],
        switches: list[dict[str, Any]],
        now_s: float,
    ) -> None:
        """Publish ``observation``, made at ``now_s`` Unix time with ``plan`` in force.

        ``lost``: replicas given up, with the reason. ``switches``: their reports, oldest first.
        """
        document = status_document(
            plan,
            observation,
            self._policy,
            model=self._deployment.models[0],
            version=__version__,
            open_breakers=self._gateway.open_breakers,
            nodes=self._nodes(),
        )
        control = self._controller
        document["control"] = {"mode": "off"} if control is None else control.document()
        document["energy"] = self._energy.observe(observation)
        document["tuning"] = self._tuning.document()
        gateways = self._gateway.status()
        document["gateways"] = gateway_documents(gateways)
        document["tiers"] = tier_rows(self._tiers, self._gateway.tier_outcomes)
        document["switch"] = switches[-1] if switches else None
        snapshot = ClusterSnapshot(
            status=msgspec.Raw(msgspec.json.encode(document)),
            switches=msgspec.Raw(msgspec.json.encode(switches)),
            gauges=gauges(observation) + self._energy.ledger.gauges() + gateway_gauges(gateways),
            counters=self._energy.ledger.counters() | self._switches.observe(switches),
        )
        self._gateway.publish(self._table(plan, observation, lost, now_s), snapshot)
        if (line := summary(observation.replicas)) != self._line:
            self._line = line
            self._changed(line)

    def _table(
        self, plan: DeploymentPlan, observation: Observation, lost: Mapping[str, str], now_s: float
    ) -> RoutingTable:
        control = self._controller
        return routing_table(
            plan if control is None else control.routed(plan, observation, now_s),
            observation,
            ordered=self._ordered,
            expected=len(lost) < len(plan.replicas),
            costs=self._costs,
            constants=self._tuning.constants,
            tiers=self._tiers,
            default_tier=self._default_tier,
        )
