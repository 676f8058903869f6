"""Simulated serving: a plan with its levers serves traffic, both given as data.

Performance facts, plans and the fleet simulator meet here and nowhere else. ``SimulatedServing``
is all that stays the same in a run: replicas, length classes, routing shares and levers. Traffic is
replayed ``scale`` times as fast, as ``oserve bench --rate-scale`` does. Its mix changes that much
faster, too.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from oserve.control.dispatch.constants import most_inflight
from oserve.control.dispatch.order import OrderPolicy
from oserve.control.dispatch.overload import OverloadPolicy, max_prompt_s
from oserve.control.dispatch.tiers import tightest
from oserve.control.routing import INFLIGHT_PER_SEQ
from oserve.core import DeploymentPlan, LengthClass, ReplicaShape, ReplicaSpec, Role, Tier
from oserve.evaluate.attainment import ATTAINMENT, attainment, surely_failed
from oserve.evaluate.ranks import ranks_s
from oserve.evaluate.tiers import late_after_s, tier_routing, tier_shifts_s
from oserve.perf import TokenCosts
from oserve.perf.corrected import uncorrected
from oserve.perf.costs import measured_costs
from oserve.perf.sequence_cache import SequenceCache
from oserve.perf.source import RooflineSource
from oserve.perf.table import PerformanceSource
from oserve.sim.fleet import SimulatedFleet
from oserve.sim.results import FleetResults
from oserve.sim.steps import StepTables, step_tables
from oserve.sim.types import FairShares, GatewayOptions, Rebalance, RequestTable, SimLink
from oserve.sim.types import RoutingPolicy as _Routing
from oserve.traces import Slo
from oserve.workload.columns import Columns, TimedRequest, columns_of

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]

Routing = _Routing
"""How the gateway chooses a replica."""

# Requests that still run so long after the last arrival count as late.
LATEST_S, _CHECKS = 300.0, 8


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SimulatedTraffic:
    """Requests in order of arrival, an entry each; lengths in tokens, at least 1.

    ``tier``: an index into the tiers, ``tenant``: one into the tenants; ``None`` without any.
    """

    arrival_s: Floats
    prompt_tokens: Ints
    output_tokens: Ints
    tier: Ints | None = None
    tenant: Ints | None = None

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def duration_s(self) -> float:
        """From 0 to the last arrival."""
        return float(self.arrival_s[-1]) if len(self) else 0.0

    @property
    def rate_rps(self) -> float:
        """Mean requests per second."""
        return len(self) / max(self.duration_s, 1.0)

    def faster(self, scale: float) -> Self:
        """The same requests, ``scale`` times as fast."""
        return replace(self, arrival_s=self.arrival_s / scale)

    def between(self, start_s: float, end_s: float) -> Self:
        """The requests from ``start_s`` up to ``end_s``, on a clock that starts at ``start_s``."""
        low, high = np.searchsorted(self.arrival_s, [start_s, end_s], side="left")
        return self.part(int(low), int(high), start_s)

    def part(self, low: int, high: int, start_s: float) -> Self:
        """The requests from one index up to another, on a clock that starts at ``start_s``."""
        return replace(
            self,
            arrival_s=self.arrival_s[low:high] - start_s,
            prompt_tokens=self.prompt_tokens[low:high],
            output_tokens=self.output_tokens[low:high],
            tier=None if self.tier is None else self.tier[low:high],
            tenant=None if self.tenant is None else self.tenant[low:high],
        )

    def columns(self) -> Columns:
        """The columns that clustering takes."""
        return Columns(
            arrival_s=self.arrival_s,
            prompt_tokens=self.prompt_tokens.astype(np.float64),
            output_tokens=self.output_tokens.astype(np.float64),
        )


def traffic_from(
    requests: Iterable[TimedRequest],
    *,
    max_model_len: int,
    tier: Ints | None = None,
    tenant: Ints | None = None,
) -> SimulatedTraffic:
    """Requests cut to the context as ``demand_from_trace`` counts them: the prompt gives way."""
    columns = columns_of(requests)
    output = np.clip(columns.output_tokens, 1, max(1, max_model_len - 1))
    prompt = np.maximum(1, np.minimum(columns.prompt_tokens, max_model_len - output))
    arrival = columns.arrival_s
    return SimulatedTraffic(
        arrival_s=arrival - (arrival[0] if len(arrival) else 0.0),
        prompt_tokens=np.rint(prompt).astype(np.int64),
        output_tokens=np.rint(output).astype(np.int64),
        tier=tier,
        tenant=tenant,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Levers:
    """How gateway and replicas serve: all settings except the plan.

    ``order``: by prompt length with ageing, in gateway and engines; ``None``: in order of arrival.
    ``inflight_per_device``: the most requests in flight on a replica, per device. Others wait in
    the gateway, where they can still go to any replica and be demoted. ``None``: twice
    ``max_num_seqs``, as in the live gateway. ``overload``: the policy of the live gateway, in place
    of demotion and shedding by ``gateway``. ``tiers``: those that the traffic's ``tier`` indexes;
    their late requests are demoted, whatever they say of overload. ``fair``: shares between the
    tenants that the traffic's ``tenant`` indexes; ``None`` serves all as one.
    """

    routing: Routing = Routing.POOLS
    order: OrderPolicy | None = None
    gateway: GatewayOptions = field(default_factory=GatewayOptions)
    inflight_per_device: float | None = None
    overload: OverloadPolicy = field(default_factory=OverloadPolicy)
    rebalance: Rebalance | None = None
    tiers: tuple[Tier, ...] = ()
    fair: FairShares | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedServing:
    """A plan and its levers."""

    plan: DeploymentPlan
    levers: Levers = field(default_factory=Levers)

    @property
    def shapes(self) -> tuple[tuple[ReplicaShape, int], ...]:
        """Distinct shapes with their counts, in order of first appearance."""
        counts: dict[ReplicaShape, int] = {}
        for spec in self.plan.replicas:
            counts[spec.shape] = counts.get(spec.shape, 0) + 1
        return tuple(counts.items())


def class_indices(classes: tuple[LengthClass, ...], prompt_tokens: Ints) -> Ints:
    """The length class of each prompt, as an index into ``classes``."""
    bounds = [item.max_prompt_tokens for item in classes[:-1]]
    return np.searchsorted(np.array(bounds, dtype=np.int64), prompt_tokens, side="left")


class Simulator:
    """Makes fleets of one model's replicas; step tables and costs once per shape."""

    def __init__(self, source: PerformanceSource) -> None:
        self.source = source
        self._tables: dict[ReplicaShape, StepTables] = {}
        self._costs: dict[ReplicaShape, TokenCosts] = {}
        self._kv: dict[ReplicaShape, int] = {}
        self._caches: dict[ReplicaShape, SequenceCache | None] = {}
        self.simulated_requests = 0

    def tables(self, shape: ReplicaShape) -> StepTables:
        """The step times of a shape."""
        if shape not in self._tables:
            self._tables[shape] = step_tables(self.source.step_model(shape), shape)
        return self._tables[shape]

    def costs(self, shape: ReplicaShape) -> TokenCosts:
        """The cost of a token on a shape, as the router assumes it."""
        if shape not in self._costs:
            self._costs[shape] = measured_costs(self.source.step_model(shape), shape)
        return self._costs[shape]

    def kv_tokens(self, shape: ReplicaShape) -> int:
        """The KV cache in tokens; 0 where the weights do not fit."""
        if shape not in self._kv:
            self._kv[shape] = self.source.kv_tokens(shape)
        return self._kv[shape]

    def sequence_cache(self, shape: ReplicaShape) -> SequenceCache | None:
        """How sequences take that cache; ``None``: by tokens."""
        if shape not in self._caches:
            self._caches[shape] = self.source.sequence_cache(shape)
        return self._caches[shape]

    def requests(
        self,
        serving: SimulatedServing,
        traffic: SimulatedTraffic,
        *,
        expected: Ints | None = None,
        kinds: Ints | None = None,
    ) -> RequestTable:
        """The requests as the gateway sees them.

        ``expected``: the expected output tokens; by default those of the length class. ``kinds``:
        the class of each request; by default that of the prompt's length.
        """
        classes = serving.plan.length_classes
        index = class_indices(classes, traffic.prompt_tokens) if kinds is None else kinds
        levers, tier = serving.levers, traffic.tier
        means = tuple(item.output_tokens for item in classes)
        if levers.tiers and tier is not None:
            index = tier * len(classes) + index
            means = tier_routing(serving.plan, levers.tiers).outputs
        if expected is None:
            expected = np.array(means, dtype=np.int64)[index]
        ranks = late = urgency = None
        if levers.order is not None:
            ranks = ranks_s(levers.order, traffic.arrival_s, traffic.prompt_tokens)
        if levers.tiers and tier is not None:
            late = late_after_s(levers.overload, levers.tiers, tier, expected)
            if levers.order is not None and ranks is not None:
                urgency = tier_shifts_s(levers.order, levers.tiers, tier, expected)
                ranks = ranks + urgency
        return RequestTable.of(
            traffic.arrival_s,
            traffic.prompt_tokens,
            traffic.output_tokens,
            expected_output_tokens=expected,
            class_index=index,
            rank_s=ranks,
            tier=tier,
            late_after_s=late,
            tenant=traffic.tenant,
            urgency_s=urgency,
        )

    def fleet(self, serving: SimulatedServing, requests: RequestTable) -> SimulatedFleet:
        """A fleet without replicas."""
        return SimulatedFleet(
            requests,
            classes=len(serving.plan.length_classes) * max(1, len(serving.levers.tiers)),
            gateway=self._gateway(serving),
            rebalance=serving.levers.rebalance,
        )

    def add(
        self, fleet: SimulatedFleet, spec: ReplicaSpec, levers: Levers, *, ready_at_s: float
    ) -> None:
        """Add a replica to a fleet; it serves from ``ready_at_s`` on."""
        shape, most = spec.shape, levers.inflight_per_device
        sends = levers.rebalance is not None or shape.role is Role.PREFILL
        link, kv_bytes = self._link(shape) if sends else (SimLink(), 0.0)
        fleet.add_replica(
            spec.id,
            shape,
            self.tables(shape),
            kv_tokens=self.kv_tokens(shape),
            costs=self.costs(shape),
            ready_at_s=ready_at_s,
            ordered=levers.order is not None,
            max_inflight=most_inflight(
                usual=INFLIGHT_PER_SEQ * shape.max_num_seqs,
                devices=shape.device_count,
                per_device=most,
            ),
            max_prompt_s=max_prompt_s(
                tightest(levers.overload, [t for t in levers.tiers if t.allows(shape.precision)]),
                step_tokens=shape.step_tokens,
                prefill_s_per_token=self.costs(shape).prefill_s_per_token,
            ),
            kv_bytes_per_token=kv_bytes,
            link=link,
            cache=self.sequence_cache(shape),
        )

    def route(self, fleet: SimulatedFleet, plan: DeploymentPlan, levers: Levers) -> None:
        """Route by the shares of a plan from now on."""
        shares = tier_routing(plan, levers.tiers).shares or {
            index: dict(plan.routing_shares.get(item.name, {}))
            for index, item in enumerate(plan.length_classes)
        }
        fleet.set_routing(policy=levers.routing, shares=shares)

    def started(
        self,
        serving: SimulatedServing,
        traffic: SimulatedTraffic,
        *,
        expected: Ints | None = None,
        kinds: Ints | None = None,
    ) -> SimulatedFleet:
        """A fleet at 0 s, whose replicas serve; for ``expected`` and ``kinds`` see ``requests``."""
        requests = self.requests(serving, traffic, expected=expected, kinds=kinds)
        fleet = self.fleet(serving, requests)
        for spec in serving.plan.replicas:
            self.add(fleet, spec, serving.levers, ready_at_s=0.0)
        self.route(fleet, serving.plan, serving.levers)
        return fleet

    def run(
        self,
        serving: SimulatedServing,
        traffic: SimulatedTraffic,
        *,
        expected: Ints | None = None,
        kinds: Ints | None = None,
        latest_s: float = LATEST_S,
    ) -> FleetResults:
        """Serve all of the traffic with a fixed plan, until ``latest_s`` after the last arrival."""
        fleet = self.started(serving, traffic, expected=expected, kinds=kinds)
        fleet.run(limit_s=traffic.duration_s + latest_s)
        self.simulated_requests += len(traffic)
        return fleet.results()

    def holds(
        self,
        serving: SimulatedServing,
        traffic: SimulatedTraffic,
        slo: Slo,
        *,
        expected: Ints | None = None,
        kinds: Ints | None = None,
    ) -> bool:
        """Whether enough requests meet the SLO; stops as soon as that is out of reach."""
        fleet = self.started(serving, traffic, expected=expected, kinds=kinds)
        self.simulated_requests += len(traffic)
        for check in range(1, _CHECKS + 1):
            fleet.advance(traffic.duration_s * check / _CHECKS)
            if surely_failed(fleet.results(), slo):
                return False
        fleet.run(limit_s=traffic.duration_s + LATEST_S)
        return attainment(fleet.results(), slo) >= ATTAINMENT

    def _gateway(self, serving: SimulatedServing) -> GatewayOptions:
        levers, overload = serving.levers, serving.levers.overload
        options = replace(levers.gateway, fair=levers.fair)
        if overload == OverloadPolicy():
            return replace(options, prompt_s_per_token=None) if levers.tiers else options
        return replace(
            options,
            demote_after_s=overload.late_after_s,
            shed_after_s=overload.shed_after_s,
            prompt_s_per_token=None,
        )

    def _link(self, shape: ReplicaShape) -> tuple[SimLink, float]:
        """The link by which KV leaves a replica, and the bytes of a token over all devices.

        0 bytes, which makes moves free, where the source knows nothing of memory.
        """
        source = uncorrected(self.source)
        if not isinstance(source, RooflineSource):
            return SimLink(), 0.0
        from oserve.perf.device import find_device  # noqa: PLC0415 - rarely needed

        facts = find_device(shape.device_kind).link
        rate = facts.bandwidth * shape.device_count
        per_token = source.memory(shape).kv_bytes_per_token * shape.device_count
        return SimLink(bytes_per_s=rate, latency_s=facts.latency_s), per_token


def largest_scale(
    holds: Callable[[float], bool],
    *,
    start: float,
    tolerance: float = 0.01,
    evaluations: int = 20,
    step: float = 1.25,
) -> float:
    """The largest scale that holds, to a relative ``tolerance``; 0 if none was found.

    Growing steps from ``start`` find a bracket; geometric bisection narrows it. At most
    ``evaluations`` scales are tried.
    """
    low, high, at, factor = 0.0, 0.0, start, step
    for _ in range(evaluations):
        if holds(at):
            low = at
        else:
            high = at
        if low and high:
            if high / low <= 1 + tolerance:
                break
            at = float(np.sqrt(low * high))
        else:
            at = at * factor if low else at / factor
            factor = min(4.0, factor * factor)
    return low
