"""What a switch would do, worked out before anything is touched: waves, bytes, seconds.

Deterministic: from what serves, what is wished and facts of devices to plain data.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

from oserve.app.switching.model import MovableModel
from oserve.core import (
    DeploymentPlan,
    Device,
    PlannedType,
    ReplicaSpec,
    VllmBackend,
)
from oserve.engines.settings import EngineSettings
from oserve.perf.device import find_link
from oserve.perf.memory import CPU_ENGINE_BYTES, GPU_ENGINE_BYTES, MEMORY_SHARE
from oserve.switch.costs import PhaseSeconds, SwitchCost, SwitchCosts, switch_cost
from oserve.switch.layout import Placed, shard_map
from oserve.switch.learned import LearnedPhases
from oserve.switch.links import links_of
from oserve.switch.orders import rank_orders
from oserve.switch.rank_order import RankOrder
from oserve.switch.tensor import volume
from oserve.switch.transfer import TransferPlan, fill_reason, plan_transfer
from oserve.switch.waves import Order, OrderPolicy, Standing, Wave, order_switch

# Of the memory that is free, what new engines may fill.
_FREE_SHARE = 0.9
# Times a transfer that is predicted for idle links.
_PATIENCE = 20.0
# Of what memory is nominally capable of, what sockets between two processes carry.
_SOCKET_SHARE = 0.1
_NETWORK = "infiniband-400"


@dataclass(frozen=True, slots=True, kw_only=True)
class SwitchFacts:
    """What stays while the server runs; ``available_bytes`` is main memory, asked when needed.

    ``learned`` is taught by the switches that are carried out.
    """

    model: MovableModel
    devices: tuple[Device, ...]
    settings: EngineSettings
    available_bytes: Callable[[], int]
    costs: SwitchCosts = field(default_factory=SwitchCosts)
    learned: LearnedPhases = field(default_factory=LearnedPhases)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A wave with all it needs; ``plan`` is in force once it is committed."""

    wave: Wave
    transfer: TransferPlan
    orders: tuple[RankOrder, ...]
    plan: DeploymentPlan
    predicted: PhaseSeconds

    def limit_s(self, least_s: float) -> float:
        """How long its transfer may take: at least that."""
        return max(least_s, _PATIENCE * self.predicted.transfer_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Programme:
    """A switch, prepared. ``before`` is the plan in force, with the replicas that serve."""

    before: DeploymentPlan
    target: DeploymentPlan
    placed: Mapping[str, Placed]
    order: Order
    steps: tuple[Step, ...]
    cost: SwitchCost

    def spec(self, replica: str) -> ReplicaSpec:
        """Of an old or a new replica."""
        found = self.target.replica(replica) or self.before.replica(replica)
        assert found is not None
        return found

    def document(self, running: Mapping[str, int]) -> dict[str, Any]:
        """For people; ``running``: requests on each replica now."""
        leaving = {name for step in self.steps for name in _leaving(step.wave)}
        return {
            "kept": list(self.order.kept),
            "floor_share": min(1.0, self.order.floor_share),
            "reason": self.order.reason,
            "waves": [_told(step) for step in self.steps],
            "ready_s": round(self.cost.ready_s, 2),
            "total_s": round(self.cost.total_s, 2),
            "requests_running_on_leaving": sum(running.get(name, 0) for name in leaving),
        }


def prepare_switch(
    facts: SwitchFacts, current: DeploymentPlan, target: DeploymentPlan
) -> Programme:
    """From a plan whose replicas all serve to another.

    Raises OServeError, with the reason, if the new replicas cannot be filled from the old ones.
    """
    target = renamed(target, current.replicas)
    placed = {spec.id: facts.model.placed(spec) for spec in (*current.replicas, *target.replicas)}
    fresh = [spec for spec in target.replicas if spec not in current.replicas]
    floor = min(_capacity(current.replicas), _capacity(target.replicas))
    policy, measure = _room(facts, current.replicas, fresh, placed, floor)
    order = order_switch(
        [measure(spec) for spec in current.replicas],
        [measure(spec) for spec in target.replicas],
        policy,
    )
    links = links_of(facts.devices, find_link(_NETWORK))
    steps, transfers = [], []
    serving = list(current.replicas)
    specs = {spec.id: spec for spec in (*current.replicas, *target.replicas)}
    for wave in order.waves:
        new = [placed[name] for name in wave.start]
        sources = _sources(wave, new, placed)
        transfer = plan_transfer(facts.model.architecture, sources, new, links, quantise=True)
        transfers.append(transfer)
        gone = _leaving(wave)
        serving = [spec for spec in serving if spec.id not in gone]
        serving += [specs[name] for name in wave.start]
        steps.append((wave, transfer, sources, new, between(target, current, serving)))
    costs = facts.costs
    if all(device.kind == "cpu" for device in facts.devices):
        costs = replace(costs, link_share=_SOCKET_SHARE)
    cost = switch_cost(
        order.waves,
        transfers,
        costs,
        hosts={name: "local" for wave in order.waves for name in wave.start},
        capacity_rps=_capacity(current.replicas),
        scaled=facts.learned.scaled,
    )
    return Programme(
        before=current,
        target=target,
        placed=placed,
        order=order,
        cost=cost,
        steps=tuple(
            Step(
                wave=wave,
                transfer=transfer,
                orders=rank_orders(facts.model.architecture, transfer, sources, new),
                plan=plan,
                predicted=predicted,
            )
            for (wave, transfer, sources, new, plan), predicted in zip(
                steps, cost.waves, strict=True
            )
        ),
    )


def renamed(target: DeploymentPlan, serving: Sequence[ReplicaSpec]) -> DeploymentPlan:
    """The plan with the names of replicas that are there already, and no other name twice.

    A replica that stays keeps its name, whatever the plan calls it; a new one of a name that is in
    use gets another.
    """
    taken = {spec.id for spec in serving}
    names: dict[str, str] = {}
    for spec in target.replicas:
        same = next((one for one in serving if replace(one, id=spec.id) == spec), None)
        if same is not None:
            names[spec.id] = same.id
    used = {*taken, *(spec.id for spec in target.replicas)}
    for spec in target.replicas:
        if spec.id in names:
            continue
        name, number = spec.id, 2
        while name in taken or (name != spec.id and name in used):
            name, number = f"{spec.id}-{number}", number + 1
        names[spec.id] = name
        taken.add(name)
    return replace(
        target,
        replicas=tuple(replace(spec, id=names[spec.id]) for spec in target.replicas),
        routing_shares={
            kind: _named(shares, names) for kind, shares in target.routing_shares.items()
        },
        types=tuple(replace(kind, shares=_named(kind.shares, names)) for kind in target.types),
    )


def between(
    target: DeploymentPlan, current: DeploymentPlan, serving: Sequence[ReplicaSpec]
) -> DeploymentPlan:
    """The target with the replicas that serve after a wave; shares go to those of it that do."""
    if set(serving) == set(target.replicas):
        return target
    ids = [spec.id for spec in serving]
    before = {kind.name: kind.shares for kind in current.types}

    def shared(wished: Mapping[str, float], old: Mapping[str, float]) -> dict[str, float]:
        for shares in (wished, old):
            kept = {name: share for name, share in shares.items() if name in ids and share > 0}
            if kept:
                total = sum(kept.values())
                return {name: share / total for name, share in kept.items()}
        return dict.fromkeys(ids, 1.0 / len(ids))

    def typed(kind: PlannedType) -> PlannedType:
        return replace(kind, shares=shared(kind.shares, before.get(kind.name, {})))

    return replace(
        target,
        replicas=tuple(serving),
        routing_shares={
            kind: shared(shares, current.routing_shares.get(kind, {}))
            for kind, shares in target.routing_shares.items()
        },
        types=tuple(map(typed, target.types)),
    )


def _named(shares: Mapping[str, float], names: Mapping[str, str]) -> dict[str, float]:
    return {names[name]: share for name, share in shares.items()}


def _leaving(wave: Wave) -> set[str]:
    return {*wave.retire, *wave.release, *wave.stop}


def _sources(wave: Wave, new: Sequence[Placed], placed: Mapping[str, Placed]) -> tuple[Placed, ...]:
    """Those that some new replica can be filled from; one for each device.

    Where a replica of the right format is there, others are not needed.
    """
    everyone = [placed[name] for name in wave.sources]
    exact = [one for one in everyone if any(one.layout.held == t.layout.held for t in new)]
    served = {one.layout.held for one in exact}
    rest = [t for t in new if t.layout.held not in served]
    more = [
        one
        for one in everyone
        if one not in exact and any(not fill_reason(t, [one], quantise=True) for t in rest)
    ]
    found: dict[str, Placed] = {}
    for one in (*exact, *more):
        if not any(device in found for device in one.devices):
            found.update(dict.fromkeys(one.devices, one))
    return tuple(dict.fromkeys(found.values()))


def _capacity(specs: Sequence[ReplicaSpec]) -> tuple[float, ...]:
    """In devices: what each serves is not known here."""
    return (float(sum(spec.shape.device_count for spec in specs)),)


def _room(
    facts: SwitchFacts,
    old: Sequence[ReplicaSpec],
    fresh: Sequence[ReplicaSpec],
    placed: Mapping[str, Placed],
    floor: tuple[float, ...],
) -> tuple[OrderPolicy, Callable[[ReplicaSpec], Standing]]:
    """Each device's memory, and what a replica takes of it."""
    cpu = all(device.kind == "cpu" for device in facts.devices)
    own = {device.id: float(device.memory_bytes) for device in facts.devices}

    def measure(spec: ReplicaSpec) -> Standing:
        weights = _weights_bytes(facts.model, placed[spec.id])
        kv = spec.shape.kv_cache_memory_bytes
        if kv is None:
            kv = facts.settings.kv_cache_memory_bytes or 0
        engine = CPU_ENGINE_BYTES if cpu else GPU_ENGINE_BYTES
        if not cpu and not kv:
            # Left to itself, an engine fills its device.
            kv = int(max(0.0, own[spec.devices[0]] * MEMORY_SHARE - weights - engine))
        return Standing(
            placed=placed[spec.id],
            # On CPU beside the packed weights there are those that can be moved.
            weights_bytes=2 * weights if cpu else weights,
            kv_bytes=kv,
            engine_bytes=engine,
            capacity_rps=_capacity([spec]),
            settings=repr((replace(spec.shape, device_kind=""), _arguments(spec))),
        )

    if cpu:
        own = _shared_memory(facts, [measure(spec) for spec in old], [measure(s) for s in fresh])
    return OrderPolicy(floor_rps=floor, memory_bytes=own, quantise=True), measure


def _shared_memory(
    facts: SwitchFacts, old: Sequence[Standing], fresh: Sequence[Standing]
) -> dict[str, float]:
    """Slots of CPU cores share main memory: what is free is for all, or for each a part."""
    free = facts.available_bytes() * _FREE_SHARE
    wanted = sum(one.total_bytes * len(one.placed.devices) for one in fresh)
    if wanted <= free:
        return {device.id: inf for device in facts.devices}
    here = {device.id: 0.0 for device in facts.devices}
    for one in old:
        for device in one.placed.devices:
            here[device] += one.total_bytes
    return {name: used + free / len(here) for name, used in here.items()}


def _arguments(spec: ReplicaSpec) -> tuple[str, ...]:
    return spec.backend.engine_args if isinstance(spec.backend, VllmBackend) else ()


def _weights_bytes(model: MovableModel, placed: Placed) -> float:
    """On the fullest of its devices."""
    return max(
        sum(
            volume(piece.box) * piece.tensor.value_bytes
            for local in shard_map(model.architecture, placed.layout, rank).values()
            for piece in local.pieces
        )
        for rank in range(placed.layout.ranks)
    )


def _told(step: Step) -> dict[str, Any]:
    traffic = step.transfer.traffic
    predicted = step.predicted
    return {
        "stop": list(step.wave.stop),
        "start": list(step.wave.start),
        "retire": list(step.wave.retire),
        "sources": sorted({order.replica for order in step.orders if order.sends}),
        "moved_bytes": traffic.moved_bytes,
        "local_bytes": traffic.local_bytes,
        "links_busy_s": step.transfer.busy_s,
        "largest_bytes": max(step.transfer.given_bytes.values(), default=0),
        "links": [
            {"source": source, "target": target, "bytes": size}
            for (source, target), size in sorted(traffic.pairs.items())
        ],
        "converted": len({(c.replica, c.parameter) for c in step.transfer.conversions}),
        "phases_s": {
            "room": round(predicted.room_s, 3),
            "prepare": round(predicted.prepare_s, 3),
            "transfer": round(predicted.transfer_s, 3),
            "verify": round(predicted.verify_s, 3),
            "commit": round(predicted.commit_s, 3),
            "drain": round(predicted.drain_s, 3),
        },
    }
