"""What may be paid so that the loss of one node leaves every type a replica.

The price of a deployment is the share of the objective that it gives up against the best one: of
the scale of the demand, or of the rate served where the demand does not fit.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from oserve.plan.deploy import PlacedReplicas, place_deployment
from oserve.plan.problem import PlanProblem
from oserve.plan.score import EQUAL
from oserve.plan.search import DeploymentCandidate, Planned, plan_deployment
from oserve.plan.spread import exposed_types, runs_as_parts, serving_of


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedChoice:
    """A deployment on devices. ``price``: the share of the objective given up for it.

    ``exposed``: by node, the types that lose their last replica with it.
    """

    deployment: DeploymentCandidate
    placed: PlacedReplicas
    price: float
    exposed: dict[str, frozenset[str]]


def place_redundantly(
    problem: PlanProblem,
    planned: Planned,
    best: DeploymentCandidate,
    *,
    spread: float,
    time_limit_s: float = 5.0,
) -> PlacedChoice:
    """The best deployment, or one that costs at most ``spread`` of the objective and exposes less.

    Of those within the price, the one that exposes the fewest pairs of node and type, then the
    best. Deployments that vLLM cannot run where they have to lie (see ``core.parts``) are left out
    while there is another.
    """
    chosen: PlacedChoice | None = None
    broken: PlacedChoice | None = None
    for deployment in _alternatives(problem, planned, best, time_limit_s=time_limit_s):
        price = _price(problem, planned, best, deployment)
        if chosen is not None and price > spread + EQUAL:
            continue
        choice = _choice(problem, deployment, price)
        if not runs_as_parts(choice.placed.replicas, problem.devices):
            broken = broken or choice
        elif chosen is None or _exposure(choice) < _exposure(chosen):
            chosen = choice
        if chosen is not None and not chosen.exposed:
            break
    result = chosen or broken
    assert result is not None  # The best itself is the first alternative.
    return result


def _alternatives(
    problem: PlanProblem, planned: Planned, best: DeploymentCandidate, *, time_limit_s: float
) -> Iterator[DeploymentCandidate]:
    """The best, the best with two replicas of each type, then the others that were found."""
    yield best
    if len({device.node for device in problem.devices}) > 1 and problem.min_replicas == 1:
        two = plan_deployment(
            replace(problem, min_replicas=2), time_limit_s=time_limit_s, candidates=0
        )
        if two.best.score.served_rps > 0:
            yield two.best
    eligible = (item for item in planned.candidates if problem.is_eligible(item.counts))
    yield from eligible
    yield from planned.homogeneous


def _choice(problem: PlanProblem, deployment: DeploymentCandidate, price: float) -> PlacedChoice:
    placed = place_deployment(problem, deployment)
    exposed = exposed_types(placed.replicas, problem.devices, serving_of(problem))
    return PlacedChoice(deployment=deployment, placed=placed, price=price, exposed=exposed)


def _exposure(choice: PlacedChoice) -> int:
    return sum(len(types) for types in choice.exposed.values())


def _price(
    problem: PlanProblem,
    planned: Planned,
    best: DeploymentCandidate,
    other: DeploymentCandidate,
) -> float:
    """The share of the best one's objective that another gives up; 0 if it is no worse."""
    enough = problem.enough_scale

    def value(deployment: DeploymentCandidate) -> float:
        if not planned.bounds_scale:
            return deployment.score.served_rps
        scale = deployment.score.scale
        return scale if enough is None else min(scale, enough)

    most = value(best)
    return max(0.0, 1.0 - value(other) / most) if most > 0 else 0.0
