"""The control loop: observe, decide, apply, once per interval, on any cluster and any clock."""

from collections.abc import Callable

from oserve.control.cluster import Cluster
from oserve.control.reconcile import ReconcilePolicy, given_up, reconcile
from oserve.control.rollout import staged
from oserve.core import Action, Clock, DeploymentPlan, Observation

Rollout = Callable[[DeploymentPlan, Observation, frozenset[str], frozenset[str]], DeploymentPlan]
"""What to hold the cluster at now, on the way to a plan; given replicas are lost, others held."""


class ControlLoop:
    """Keeps a cluster at a plan, which may be replaced at any time; then it is rolled out.

    ``held`` names replicas that a switch is at work on, which the loop leaves alone.
    ``observed`` is called with each round's observation. ``rollout`` says how plans are reached.
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
    ) -> None:
        self.plan = plan
        self.held: frozenset[str] = frozenset()
        self._cluster = cluster
        self._clock = clock
        self._policy = policy
        self._interval_s = interval_s
        self._observed = observed
        self._rollout = rollout

    async def step(self) -> tuple[Action, ...]:
        """One round; returns what was asked."""
        observation = await self._cluster.observe()
        lost = frozenset(given_up(self.plan, observation, self._policy))
        wished = self._rollout(self.plan, observation, lost, self.held)
        actions = reconcile(wished, observation, self._policy, self.held)
        for action in actions:
            await self._cluster.apply(action)
        self._observed(observation, actions)
        return actions

    async def run(self) -> None:
        """Rounds until cancelled."""
        while True:
            await self.step()
            await self._clock.sleep(self._interval_s)
