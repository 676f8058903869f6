"""The programme of a switch: waves, bytes and seconds, worked out before anything is touched.

Deterministic: a function of the plans in force and wished for, and of facts of devices.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from oserve.core import DeploymentPlan, Device, OServeError, ReplicaSpec
from oserve.perf.device import Link, find_link
from oserve.perf.source import DEFAULT_NETWORK
from oserve.switch.costs import PhaseSeconds, SwitchCost, SwitchCosts, switch_cost
from oserve.switch.footprint import Footprints, capacity_of
from oserve.switch.interim import between, renamed
from oserve.switch.layout import Architecture, ShardPlacement
from oserve.switch.learned import LearnedPhases
from oserve.switch.links import links_of
from oserve.switch.model import MovableModel
from oserve.switch.orders import conversion_scheme
from oserve.switch.transfer import TransferPlan, fill_reason, plan_transfer
from oserve.switch.waves import Wave, WaveOrder, WavePolicy, order_switch

# A transfer may take so many times what is predicted for idle links.
_PATIENCE = 20.0
# Share of the nominal memory bandwidth that sockets between two processes carry.
_SOCKET_SHARE = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class SwitchFacts:
    """What does not change while a server runs, and what it learns.

    ``kv_cache_memory_bytes``: per device, where a shape names none; 0 leaves it to engines.
    ``available_bytes`` returns the free main memory. ``releases_cache``: engines can free their KV
    cache and keep their weights, and stand by without a cache, which those of a server cannot.
    ``network``: the link between nodes, by name or itself. ``measured`` returns the bytes per
    second that were measured from one node to another, by (sender, receiver). Switches that are
    carried out teach ``learned``.
    """

    model: MovableModel
    devices: tuple[Device, ...]
    kv_cache_memory_bytes: int
    available_bytes: Callable[[], int]
    releases_cache: bool = False
    network: str | Link = DEFAULT_NETWORK
    measured: Callable[[], Mapping[tuple[str, str], float]] = dict
    costs: SwitchCosts = field(default_factory=SwitchCosts)
    learned: LearnedPhases = field(default_factory=LearnedPhases)

    @property
    def network_link(self) -> Link:
        """The link between nodes of which nothing was measured."""
        return self.network if isinstance(self.network, Link) else find_link(self.network)

    @property
    def footprints(self) -> Footprints:
        """Measures replicas on these devices."""
        return Footprints(
            model=self.model,
            devices=self.devices,
            kv_cache_memory_bytes=self.kv_cache_memory_bytes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgrammeStep:
    """A wave with its transfer, and the plan that is in force once it is committed.

    ``sources`` hold weights during the transfer, ``targets`` receive them.
    """

    number: int
    wave: Wave
    sources: tuple[ShardPlacement, ...]
    targets: tuple[ShardPlacement, ...]
    transfer: TransferPlan
    plan: DeploymentPlan
    predicted: PhaseSeconds

    @property
    def participants(self) -> tuple[str, ...]:
        """Replicas that take part in the transfer, sources first."""
        return tuple(dict.fromkeys(one.replica for one in (*self.sources, *self.targets)))

    @property
    def senders(self) -> tuple[str, ...]:
        """Replicas that send weights, over links or to another engine on their own device."""
        at = {device: one.replica for one in self.sources for device in one.devices}
        copies = (*self.transfer.copies, *self.transfer.kept)
        return tuple(sorted({at[copy.source] for copy in copies if copy.source in at}))

    @property
    def moved_bytes(self) -> int:
        """Bytes over links and inside devices."""
        return self.transfer.traffic.moved_bytes + self.transfer.traffic.local_bytes

    def limit_s(self, least_s: float) -> float:
        """Return the time limit of the transfer: ``least_s``, or 20 times its prediction."""
        return max(least_s, _PATIENCE * self.predicted.transfer_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class SwitchProgramme:
    """A prepared switch. ``before`` is the plan in force, whose replicas all serve.

    ``nodes``: of each device, by its id.
    """

    before: DeploymentPlan
    target: DeploymentPlan
    architecture: Architecture
    placed: Mapping[str, ShardPlacement]
    order: WaveOrder
    steps: tuple[ProgrammeStep, ...]
    cost: SwitchCost
    nodes: Mapping[str, str] = field(default_factory=dict)

    def spec(self, replica: str) -> ReplicaSpec:
        """Return an old or a new replica. Raises KeyError for any other name."""
        found = self.target.replica(replica) or self.before.replica(replica)
        if found is None:
            raise KeyError(replica)
        return found

    def before_step(self, number: int) -> DeploymentPlan:
        """Return the plan that is in force before a wave."""
        return self.steps[number - 1].plan if number else self.before

    def node_of(self, replica: str, rank: int) -> str:
        """The node where a rank of a replica is."""
        return self.nodes.get(self.placed[replica].devices[rank], "")


@dataclass(frozen=True, slots=True, kw_only=True)
class _WaveTransfer:
    """A wave with its transfer, before its time is predicted."""

    wave: Wave
    sources: tuple[ShardPlacement, ...]
    targets: tuple[ShardPlacement, ...]
    transfer: TransferPlan
    plan: DeploymentPlan


def prepare_switch(
    facts: SwitchFacts, current: DeploymentPlan, target: DeploymentPlan
) -> SwitchProgramme:
    """Prepare the switch from a plan whose replicas all serve to another.

    Raises OServeError, with the reason, if the new replicas cannot be filled from the old ones.
    """
    target = renamed(target, current.replicas)
    known = {device.id for device in facts.devices}
    for spec in target.replicas:
        if not known.issuperset(spec.devices):
            raise OServeError(
                f"replica {spec.id} is on a node that has just come",
                place="switch",
                remedy="weights move there as soon as the plan knows the node",
            )
    placed = {spec.id: facts.model.placed(spec) for spec in (*current.replicas, *target.replicas)}
    order = _order(facts, current, target, placed)
    transfers = _transfers(facts, current, target, placed, order)
    cost = _cost(facts, current, target, transfers)
    steps = tuple(
        ProgrammeStep(
            number=number,
            wave=one.wave,
            sources=one.sources,
            targets=one.targets,
            transfer=one.transfer,
            plan=one.plan,
            predicted=predicted,
        )
        for number, (one, predicted) in enumerate(zip(transfers, cost.waves, strict=True))
    )
    return SwitchProgramme(
        before=current,
        target=target,
        architecture=facts.model.architecture,
        placed=placed,
        order=order,
        steps=steps,
        cost=cost,
        nodes={device.id: device.node for device in facts.devices},
    )


def _order(
    facts: SwitchFacts,
    current: DeploymentPlan,
    target: DeploymentPlan,
    placed: Mapping[str, ShardPlacement],
) -> WaveOrder:
    footprints = facts.footprints
    old = [footprints.measure(spec, placed[spec.id]) for spec in current.replicas]
    new = [footprints.measure(spec, placed[spec.id]) for spec in target.replicas]
    kept = {spec.id for spec in target.replicas if spec in current.replicas}
    fresh = [one for one in new if one.id not in kept]
    policy = WavePolicy(
        floor_rps=min(capacity_of(current.replicas), capacity_of(target.replicas)),
        memory_bytes=footprints.room_bytes(old, fresh, facts.available_bytes),
        releases_cache=facts.releases_cache,
        standby_without_cache=facts.releases_cache,
        quantise=True,
    )
    return order_switch(old, new, policy)


def _transfers(
    facts: SwitchFacts,
    current: DeploymentPlan,
    target: DeploymentPlan,
    placed: Mapping[str, ShardPlacement],
    order: WaveOrder,
) -> list[_WaveTransfer]:
    links = links_of(facts.devices, facts.network_link, measured=facts.measured())
    specs = {spec.id: spec for spec in (*current.replicas, *target.replicas)}
    serving = list(current.replicas)
    found = []
    for wave in order.waves:
        targets = tuple(placed[name] for name in wave.start)
        sources = _sources(wave, targets, placed)
        transfer = plan_transfer(facts.model.architecture, sources, targets, links, quantise=True)
        _refuse_conversions(transfer, placed)
        serving = [spec for spec in serving if spec.id not in wave.leaving]
        serving += [specs[name] for name in wave.start]
        found.append(
            _WaveTransfer(
                wave=wave,
                sources=sources,
                targets=targets,
                transfer=transfer,
                plan=between(target, current, serving),
            )
        )
    return found


def _refuse_conversions(transfer: TransferPlan, placed: Mapping[str, ShardPlacement]) -> None:
    """Raise OServeError for a precision that engines cannot make on the way."""
    for conversion in transfer.conversions:
        if not conversion.cast:
            conversion_scheme(placed[conversion.replica].layout.held.precision)


def _cost(
    facts: SwitchFacts,
    current: DeploymentPlan,
    target: DeploymentPlan,
    transfers: Sequence[_WaveTransfer],
) -> SwitchCost:
    costs = facts.costs
    if facts.footprints.on_cpu:
        costs = replace(costs, link_share=_SOCKET_SHARE)
    nodes = {device.id: device.node for device in facts.devices}
    return switch_cost(
        [one.wave for one in transfers],
        [one.transfer for one in transfers],
        costs,
        hosts={spec.id: nodes[spec.devices[0]] for spec in target.replicas},
        capacity_rps=capacity_of(current.replicas),
        scaled=facts.learned.scaled,
    )


def _sources(
    wave: Wave, targets: Sequence[ShardPlacement], placed: Mapping[str, ShardPlacement]
) -> tuple[ShardPlacement, ...]:
    """Return replicas that some target can be filled from, one for each device.

    Where a replica holds the right format, no other source is needed.
    """
    everyone = [placed[name] for name in wave.sources]
    exact = [one for one in everyone if any(one.layout.held == t.layout.held for t in targets)]
    served = {one.layout.held for one in exact}
    rest = [t for t in targets if t.layout.held not in served]
    more = [
        one
        for one in everyone
        if one not in exact and any(not fill_reason(t, [one], quantise=True) for t in rest)
    ]
    found: dict[str, ShardPlacement] = {}
    for one in (*exact, *more):
        if not any(device in found for device in one.devices):
            found.update(dict.fromkeys(one.devices, one))
    return tuple(dict.fromkeys(found.values()))
