"""What a gateway would have counted of simulated requests, second by second."""

from oserve.control.dispatch.table import RoutingTable
from oserve.control.tally import Batch
from oserve.core import DeploymentPlan
from oserve.evaluate.simulator import SimulatedTraffic
from oserve.gateway.estimator import RequestEstimate, RequestEstimator
from oserve.sim.types import Status
from oserve.study.policy import Moment
from oserve.workload.output import KnownAtArrival


class TrafficCounter:
    """Counts requests by the workload types of a plan, as the gateway's request estimator does."""

    def __init__(self, plan: DeploymentPlan, traffic: SimulatedTraffic) -> None:
        self._traffic = traffic
        self._estimator = RequestEstimator()
        self._estimator.follow(
            RoutingTable(
                plan_id=plan.id,
                length_classes=plan.length_classes,
                routing_shares=plan.routing_shares,
                replicas=(),
                planned_types=plan.planned_types,
            )
        )
        self._open: dict[int, RequestEstimate] = {}

    def batch(self, moment: Moment) -> Batch:
        """The counts of the requests that arrived and ended since the last batch."""
        estimator, traffic = self._estimator, self._traffic
        for number in range(*moment.came):
            known = KnownAtArrival(prompt_tokens=int(traffic.prompt_tokens[number]))
            expected = estimator.estimate_known(known, arrived_s=float(traffic.arrival_s[number]))
            estimator.tally.arrived(expected.arrived_s, expected.probabilities)
            self._open[number] = expected
        for number, status in moment.ended:
            estimator.ended(
                self._open.pop(number),
                completed=status == Status.COMPLETED,
                prompt_tokens=int(traffic.prompt_tokens[number]),
                output_tokens=int(traffic.output_tokens[number]),
                now_s=moment.now_s,
            )
        taken = estimator.tally.take()
        estimator.tally.acknowledge(taken.number)
        return taken
