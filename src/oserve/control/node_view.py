"""The cluster as its nodes allow: what serves, and what of a plan can run.

Pure. A replica on a lost node is gone, whatever the cluster still says of it, so that it leaves
routing at once and its streams go on elsewhere. One over several nodes, of which one is lost,
leaves as well, but counts as hung until the cluster has ended the rest of it: its devices on the
other nodes are not free before. One on a node that is held down is away: it is neither used nor
stopped, since it may serve again once the hold-down is over.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from oserve.control.nodes import NodeBook
from oserve.core import (
    DeploymentPlan,
    Device,
    NodePhase,
    NodeState,
    Observation,
    ReplicaPhase,
    ReplicaSpec,
    ReplicaState,
)


class NodeView:
    """Judges observations by a book of nodes. It remembers on which node each device is.

    ``evacuated``: draining nodes whose replicas leave now, whether others replace them or not.
    """

    def __init__(self, book: NodeBook | None = None) -> None:
        self.book = book or NodeBook()
        self.evacuated: frozenset[str] = frozenset()
        self._node_of: dict[str, str] = {}

    def judge(self, observation: Observation) -> Observation:
        """The observation with its nodes' states, and without what lost nodes held."""
        self._node_of.update({device.id: device.node for device in observation.devices})
        if not observation.nodes and not observation.node_states:
            return observation
        states = self.book.observe(observation.now_s, observation.nodes)
        if all(state.startable for state in states):
            self.evacuated = frozenset()
            return replace(observation, node_states=states)
        by_name = {state.name: state for state in states}
        draining = {state.name for state in states if state.word == NodePhase.DRAINING.value}
        self.evacuated &= draining
        gone = {state.name for state in states if state.phase is NodePhase.LOST}
        return replace(
            observation,
            devices=tuple(d for d in observation.devices if d.node not in gone),
            replicas=tuple(
                self._replica(state, by_name, observation.now_s) for state in observation.replicas
            ),
            failures={
                name: failures
                for name, failures in observation.failures.items()
                if gone.isdisjoint(self._nodes(failures.spec))
            },
            node_states=states,
        )

    def runnable(self, plan: DeploymentPlan, observation: Observation) -> DeploymentPlan:
        """The plan without replicas that cannot run, or that leave a node which is evacuated."""
        barred = self.evacuated | {s.name for s in observation.node_states if not s.reachable}
        if not barred:
            return plan
        kept = tuple(spec for spec in plan.replicas if barred.isdisjoint(self._nodes(spec)))
        return plan if len(kept) == len(plan.replicas) else replace(plan, replicas=kept)

    def away(self, plan: DeploymentPlan, observation: Observation) -> frozenset[str]:
        """Replicas of the plan that wait for the end of a hold-down: nobody touches them."""
        return frozenset(
            state.spec.id
            for state in observation.replicas
            if state.phase is ReplicaPhase.AWAY and plan.replica(state.spec.id) == state.spec
        )

    def on_node(self, name: str, observation: Observation) -> list[str]:
        """The replicas that live on a node."""
        return [
            state.spec.id
            for state in observation.replicas
            if state.phase is not ReplicaPhase.GONE and name in self._nodes(state.spec)
        ]

    def _nodes(self, spec: ReplicaSpec) -> set[str]:
        return {self._node_of.get(device, "") for device in spec.devices}

    def _replica(
        self, state: ReplicaState, nodes: dict[str, NodeState], now_s: float
    ) -> ReplicaState:
        if state.phase is ReplicaPhase.GONE:
            return state
        own = [nodes[name] for name in sorted(self._nodes(state.spec)) if name in nodes]
        for node in own:
            if node.phase is NodePhase.LOST:
                detail = f"node {node.name} is lost: {node.reason}"
                # Its part elsewhere has its devices until it has ended there.
                left = any(other.phase is not NodePhase.LOST for other in own)
                phase = ReplicaPhase.HUNG if left else ReplicaPhase.GONE
                return _changed(state, phase, detail)
        for node in own:
            if not node.reachable:
                detail = f"node {node.name} is held down for {max(0.0, node.until_s - now_s):.0f} s"
                return _changed(state, ReplicaPhase.AWAY, detail)
        return state


def _changed(state: ReplicaState, phase: ReplicaPhase, detail: str) -> ReplicaState:
    return replace(state, phase=phase, detail=detail, running=0, waiting=0)


def unusable_devices(devices: Iterable[Device], states: Sequence[NodeState]) -> frozenset[str]:
    """The devices of these that no plan may use now."""
    barred = {state.name for state in states if not state.usable}
    return frozenset(device.id for device in devices if device.node in barred)


def remaining(plan: DeploymentPlan, unusable: Collection[str]) -> DeploymentPlan:
    """The plan without the replicas that hold a device of these."""
    if not unusable:
        return plan
    kept = tuple(spec for spec in plan.replicas if not any(d in unusable for d in spec.devices))
    return plan if len(kept) == len(plan.replicas) else replace(plan, replicas=kept)
