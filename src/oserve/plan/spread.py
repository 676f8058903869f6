"""Spread: replicas on different nodes, so that the loss of one leaves every type a replica.

A type is *exposed* to a node if every replica that can serve it has a part there. Placement moves
or exchanges new replicas where that exposes fewer types, which costs nothing of the objective. If
types stay exposed, the planner asks for two replicas of each, and pays for that as much as
``planning.spread`` allows.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from typing import TypeAlias

from oserve.core import Device, OServeError, ReplicaShape, ReplicaSpec, parts_of
from oserve.plan.problem import PlanProblem

TypesServed: TypeAlias = Callable[[ReplicaShape], Set[str]]
"""The types that a shape can serve."""

# The most moves and exchanges that one placement gets.
_MOST_STEPS = 64


def serving_of(problem: PlanProblem) -> TypesServed:
    """The types with traffic that each of the problem's shapes can serve; others serve none."""
    found = {
        option.shape: frozenset(
            kind.name
            for kind, capacity in zip(problem.types, option.capacity_rps, strict=True)
            if capacity > 0 and kind.arrival_rate_rps > 0
        )
        for option in problem.options
    }
    return lambda shape: found.get(shape, frozenset())


def exposed_types(
    replicas: Sequence[ReplicaSpec], devices: Sequence[Device], serving: TypesServed
) -> dict[str, frozenset[str]]:
    """By node, the types that no replica serves once the node is lost.

    Types that no replica serves anyway do not count, and nothing survives the only node.
    """
    node_of = {device.id: device.node for device in devices}
    if len(set(node_of.values())) < 2:
        return {}
    exposed: dict[str, set[str]] = {}
    for node, kind in _pairs(replicas, node_of, serving):
        exposed.setdefault(node, set()).add(kind)
    return {node: frozenset(exposed[node]) for node in sorted(exposed)}


def _pairs(
    replicas: Sequence[ReplicaSpec], node_of: Mapping[str, str], serving: TypesServed
) -> list[tuple[str, str]]:
    """Pairs of a node and a type that is exposed to it."""
    total: Counter[str] = Counter()
    here: Counter[tuple[str, str]] = Counter()
    for spec in replicas:
        types = serving(spec.shape)
        total.update(types)
        here.update((node, kind) for node in _nodes(spec, node_of) for kind in types)
    return [pair for pair, count in here.items() if count == total[pair[1]]]


def runs_as_parts(replicas: Sequence[ReplicaSpec], devices: Sequence[Device]) -> bool:
    """Whether vLLM can run each of these replicas where its devices are; see ``core.parts``."""
    known = {device.id: device for device in devices}
    try:
        for spec in replicas:
            parts_of(spec, known)
    except OServeError:
        return False
    return True


def spread_out(
    replicas: Sequence[ReplicaSpec],
    movable: Set[str],
    devices: Sequence[Device],
    serving: TypesServed,
    reserved: Set[str] = frozenset(),
) -> tuple[ReplicaSpec, ...]:
    """The same replicas with as few types exposed as single moves and exchanges achieve.

    Only those in ``movable`` (ids) change their devices, and only replicas on one node; none moves
    to ``reserved`` devices. Each step must expose fewer pairs of node and type.
    """
    node_of = {device.id: device.node for device in devices}
    now = tuple(replicas)
    if len(set(node_of.values())) < 2:
        return now
    for _ in range(_MOST_STEPS):
        exposed = _pairs(now, node_of, serving)
        better = next(
            (
                other
                for other in _steps(now, movable, devices, exposed, serving, reserved)
                if len(_pairs(other, node_of, serving)) < len(exposed)
            ),
            None,
        )
        if better is None:
            break
        now = better
    return now


def _steps(
    replicas: tuple[ReplicaSpec, ...],
    movable: Set[str],
    devices: Sequence[Device],
    exposed: Sequence[tuple[str, str]],
    serving: TypesServed,
    reserved: Set[str],
) -> Iterator[tuple[ReplicaSpec, ...]]:
    """Every move to another node that may help, then every exchange.

    Of a type with one replica none helps. Of replicas of one shape on one node, the first stands
    for all.
    """
    node_of = {device.id: device.node for device in devices}
    kind_of = {device.id: device.kind for device in devices}
    total = Counter(kind for spec in replicas for kind in serving(spec.shape))
    single: dict[tuple[str, ReplicaShape], int] = {}
    for place, spec in enumerate(replicas):
        if spec.id in movable and len(_nodes(spec, node_of)) == 1:
            single.setdefault((node_of[spec.devices[0]], spec.shape), place)
    leaving = [
        (node, place)
        for (node, shape), place in single.items()
        if any(total[kind] > 1 and kind in serving(shape) for own, kind in exposed if own == node)
    ]
    used = {device for spec in replicas for device in spec.devices} | reserved
    free: dict[tuple[str, str], list[str]] = {}
    for device in devices:
        if device.id not in used:
            free.setdefault((device.kind, device.node), []).append(device.id)
    for node, place in leaving:
        own = replicas[place].devices
        for (kind, other_node), ids in free.items():
            if other_node != node and kind == kind_of[own[0]] and len(ids) >= len(own):
                yield _with(replicas, {place: tuple(ids[: len(own)])})
    for node, place in leaving:
        own = replicas[place].devices
        for (other_node, shape), other_place in single.items():
            theirs = replicas[other_place].devices
            alike = len(own) == len(theirs) and kind_of[own[0]] == kind_of[theirs[0]]
            if alike and other_node != node and shape != replicas[place].shape:
                yield _with(replicas, {place: theirs, other_place: own})


def _with(
    replicas: tuple[ReplicaSpec, ...], changed: Mapping[int, tuple[str, ...]]
) -> tuple[ReplicaSpec, ...]:
    return tuple(
        replace(spec, devices=changed[place]) if place in changed else spec
        for place, spec in enumerate(replicas)
    )


def _nodes(spec: ReplicaSpec, node_of: Mapping[str, str]) -> set[str]:
    return {node_of[device] for device in spec.devices}
