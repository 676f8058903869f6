"""The control loop: observe, reconcile and apply once per interval, on any cluster and clock."""

from collections.abc import Callable

from oserve.control.cluster import Cluster
from oserve.control.node_view import NodeView
from oserve.control.reconcile import ReconcilePolicy, given_up, reconcile
from oserve.control.rollout import staged
from oserve.core import Action, Clock, DeploymentPlan, Observation

Rollout = Callable[[DeploymentPlan, Observation, frozenset[str], frozenset[str]], DeploymentPlan]
"""The plan to reconcile to now: target, observation, replicas given up, replicas held."""


class ControlLoop:
    """Keeps a cluster at ``plan``. Assign another plan at any time: it is rolled out.

    ``held``: replicas that a switch controls; the loop does not touch them. ``observed`` is called
    with the observation and the actions of each round. ``rollout``: the stages towards a plan.
    ``nodes`` judges the nodes of a cluster of several: the plan stays, but what of it is on nodes
    that are lost or held down does not run.
    """

    def __init__(
        self,
        cluster: Cluster,
        clock: Clock,
        plan: DeploymentPlan,
        *,
        policy: ReconcilePolicy,
        interval_s: float = 0.5,
        observed: Callable[[Observation, tuple[Action, ...]], None] = lambda _o, _a: None,
        rollout: Rollout = staged,
        nodes: NodeView | None = None,
    ) -> None:
        self.plan = plan
        self.nodes = nodes or NodeView()
        self.held: frozenset[str] = frozenset()
        self._cluster = cluster
        self._clock = clock
        self._policy = policy
        self._interval_s = interval_s
        self._observed = observed
        self._rollout = rollout

    async def look(self) -> Observation:
        """The cluster as its nodes allow (see ``node_view``); changes nothing."""
        return self.nodes.judge(await self._cluster.observe())

    async def step(self) -> tuple[Action, ...]:
        """One round; returns its actions."""
        observation = await self.look()
        plan = self.nodes.runnable(self.plan, observation)
        lost = frozenset(given_up(plan, observation, self._policy))
        held = self.held | self.nodes.away(self.plan, observation)
        # The stages follow from the whole plan: what cannot run now must not end what serves.
        desired = self.nodes.runnable(
            self._rollout(self.plan, observation, lost, held), observation
        )
        actions = reconcile(desired, observation, self._policy, held)
        for action in actions:
            await self._cluster.apply(action)
        self._observed(observation, actions)
        return actions

    async def run(self) -> None:
        """Run rounds until cancelled."""
        while True:
            await self.step()
            await self._clock.sleep(self._interval_s)
