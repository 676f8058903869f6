"""From the counts of a deployment to replicas on devices, and routing shares by replica id."""

from collections.abc import Mapping
from dataclasses import dataclass

from oserve.core import Backend, ReplicaShape, ReplicaSpec
from oserve.plan.place import place_replicas
from oserve.plan.problem import PlanProblem
from oserve.plan.search import DeploymentCandidate
from oserve.plan.spread import serving_of

# Smaller shares are rounding errors of the solver.
_SMALLEST_SHARE = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedReplicas:
    """A deployment on concrete devices.

    ``routing_shares[type name][replica id]`` sums to 1 per type; ``utilisation`` is by replica id;
    ``moved_fraction`` is the amount of weights to move, in copies of the model (see ``place``).
    """

    replicas: tuple[ReplicaSpec, ...]
    routing_shares: Mapping[str, Mapping[str, float]]
    utilisation: Mapping[str, float]
    moved_fraction: float


def place_deployment(
    problem: PlanProblem, deployment: DeploymentCandidate, *, backend: Backend | None = None
) -> PlacedReplicas:
    """Place a deployment of the problem, close to the problem's current plan.

    The share of an option is split evenly over its replicas. New replicas run on ``backend``.
    """
    placement = place_replicas(
        [
            (option.shape, count)
            for option, count in zip(problem.options, deployment.counts, strict=True)
        ],
        problem.devices,
        current=problem.current,
        tensor_parallel_across_nodes=problem.tensor_parallel_across_nodes,
        backend=backend,
        serving=serving_of(problem),
    )
    by_shape: dict[ReplicaShape, list[str]] = {}
    for spec in placement.replicas:
        by_shape.setdefault(spec.shape, []).append(spec.id)
    ids = [by_shape.get(option.shape, []) for option in problem.options]
    assignment = deployment.assignment
    shares = {
        kind.name: _split([row[column] for row in assignment.shares], ids)
        for column, kind in enumerate(problem.types)
    }
    return PlacedReplicas(
        replicas=placement.replicas,
        routing_shares=shares,
        utilisation={
            replica: assignment.utilisation[option]
            for option, replicas in enumerate(ids)
            for replica in replicas
        },
        moved_fraction=placement.moved_fraction,
    )


def _split(shares: list[float], ids: list[list[str]]) -> dict[str, float]:
    total = sum(share for share in shares if share >= _SMALLEST_SHARE)
    return {
        replica: share / total / len(replicas)
        for share, replicas in zip(shares, ids, strict=True)
        if share >= _SMALLEST_SHARE
        for replica in replicas
    }
