"""Random workloads on random fleets, for the kernel and for the reference.

Times are few and round, so that many things happen at the same moment; caches are small, so that
sequences are preempted often. Expected work falls on whole steps of the router's comparison, and
limits beside them: where sums of floats decide, both sides decide alike.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from oserve.control.dispatch.fair_policy import FairPolicy
from oserve.control.dispatch.order import OrderPolicy
from oserve.control.dispatch.overload import OverloadPolicy, max_prompt_s
from oserve.control.dispatch.tiers import tightest
from oserve.core import OverloadAction, Precision, Promise, ReplicaShape, Role, Tier
from oserve.evaluate.tiers import BARRED, late_after_s, tier_shifts_s
from oserve.perf import TokenCosts
from oserve.perf.sequence_cache import SequenceCache
from oserve.sim.fleet import SimulatedFleet
from oserve.sim.steps import StepTables
from oserve.sim.types import (
    FairShares,
    GatewayOptions,
    RequestTable,
    RoutingPolicy,
    SimLink,
    Status,
)
from sim.engine_reference import PS, Engine, Job, Layout
from sim.reference import UNLIMITED, Reference

# 0.1 ms, the router's step.
UNIT = 10**8
# What puts limits beside whole units, in picoseconds.
BESIDE = 37 * 10**6

POLICIES = {
    "pools": RoutingPolicy.POOLS,
    "work": RoutingPolicy.LEAST_WORK,
    "requests": RoutingPolicy.LEAST_REQUESTS,
    "turn": RoutingPolicy.ROUND_ROBIN,
    "freeness": RoutingPolicy.FREENESS,
}

PLAIN = Layout()


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One replica; times in units."""

    seqs: int
    budget: int
    kv_blocks: int
    stages: int
    role: Role
    ordered: bool
    max_inflight: int
    base: int
    per_token: int
    per_seq: int
    kv_rate: int
    pair_rate: int
    cost: int
    link: int
    latency: int
    ready_at: int
    precision: Precision = Precision.BF16
    layout: Layout = PLAIN

    def tables(self) -> StepTables:
        tokens = np.arange(self.budget + 1, dtype=np.int64)
        seqs = np.arange(self.seqs + 1, dtype=np.int64)
        return StepTables(
            prompts=(self.base + self.per_token * tokens) * (tokens > 0) * UNIT,
            joint=self.per_seq * seqs * UNIT,
            decodes=(self.base + self.per_seq * seqs) * (seqs > 0) * UNIT,
            kv_rate=self.kv_rate * UNIT,
            pair_rate=self.pair_rate * UNIT,
        )

    @property
    def prefill_s(self) -> float:
        return self.cost * UNIT / PS

    def engine(self, name: str) -> Engine:
        tables = self.tables()
        return Engine(
            name=name,
            prompts=tables.prompts.tolist(),
            joint=tables.joint.tolist(),
            decodes=tables.decodes.tolist(),
            kv_rate=tables.kv_rate,
            pair_rate=tables.pair_rate,
            seqs=self.seqs,
            budget=self.budget,
            total_blocks=self.kv_blocks,
            layout=self.layout,
            stages=self.stages,
            precision=self.precision,
            role=self.role.value,
            ordered=self.ordered,
            max_inflight=self.max_inflight,
            prefill_s=self.prefill_s,
            decode_s=3 * self.prefill_s,
            link_ps=self.latency * UNIT,
            link_ps_per_token=self.link * UNIT,
            ready_at=self.ready_at * UNIT,
            phase="loading" if self.ready_at else "ready",
        )

    def cache(self) -> SequenceCache:
        own = self.layout
        return SequenceCache(
            blocks=self.kv_blocks,
            block_tokens=own.size,
            tables=own.tables,
            state_blocks=own.states,
            window_tables=own.windows,
            window_tokens=own.window,
            window_block_tokens=own.window_size,
        )

    def add_to(self, fleet: SimulatedFleet, name: str, overload: OverloadPolicy) -> None:
        fleet.add_replica(
            name,
            ReplicaShape(
                pipeline_parallel_size=self.stages,
                precision=self.precision,
                max_num_batched_tokens=self.budget,
                max_num_seqs=self.seqs,
                role=self.role,
            ),
            self.tables(),
            kv_tokens=16 * self.kv_blocks + 3,
            costs=TokenCosts(
                prefill_s_per_token=self.prefill_s, decode_s_per_token=3 * self.prefill_s
            ),
            ready_at_s=self.ready_at * UNIT / PS,
            ordered=self.ordered,
            max_inflight=self.max_inflight,
            max_prompt_s=max_prompt_s(overload, step_tokens=0, prefill_s_per_token=self.prefill_s),
            kv_bytes_per_token=1.0,
            cache=None if self.layout == PLAIN else self.cache(),
            link=SimLink(
                bytes_per_s=PS / (self.link * UNIT) if self.link else float("inf"),
                latency_s=self.latency * UNIT / PS,
            ),
        )


@dataclass(frozen=True, kw_only=True)
class Operation:
    """What a caller does at a moment (in units)."""

    at: int
    kind: str
    replica: int = 0
    request: int = 0


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """Requests are (arrival, prompt, output, expected, class, rank, session); times in units.

    ``owners``: the tenant and the tier of each request, by number; empty without.
    """

    requests: list[tuple[int, int, int, int, int, int, int]]
    replicas: list[Spec]
    policy: str
    shares: dict[int, dict[str, float]]
    operations: list[Operation] = field(default_factory=list)
    overflow: int = 0
    max_queued: int = 1000
    ttft: int | None = None
    shed: int | None = None
    closed_loop: int = 0
    max_attempts: int = 10**6
    max_moves: int = 10**6
    owners: list[tuple[int, int]] = field(default_factory=list)
    tiers: tuple[Tier, ...] = ()
    weights: tuple[float, ...] = ()
    reserve: float = 0.0
    active: int = 0

    def promise(self, number: int) -> Promise | None:
        return Promise.of(self.tiers[self.owners[number][1]]) if self.tiers else None

    @property
    def active_s(self) -> float:
        return (self.active * UNIT + BESIDE) / PS

    @property
    def fair(self) -> FairPolicy:
        return FairPolicy(
            weights={f"t{index}": weight for index, weight in enumerate(self.weights)},
            reserve=self.reserve,
            active_s=self.active_s,
        )

    @property
    def replica_overload(self) -> OverloadPolicy:
        return tightest(self.overload, self.tiers)

    def routing(self) -> dict[int, dict[str, float]]:
        """The kernel's shares: of each tier and class, without replicas of other precisions."""
        if not self.tiers:
            return self.shares
        return {
            2 * place + kind: {
                name: self.shares.get(kind, {}).get(name, 0.0)
                if tier.allows(spec.precision)
                else BARRED
                for name, spec in zip(_names(len(self.replicas)), self.replicas, strict=True)
            }
            for place, tier in enumerate(self.tiers)
            for kind in range(2)
        }

    @property
    def overload(self) -> OverloadPolicy:
        return OverloadPolicy(
            ttft_s=None if self.ttft is None else (self.ttft * UNIT + BESIDE) / PS,
            shed_after_s=None if self.shed is None else (self.shed * UNIT + BESIDE) / PS,
        )

    @property
    def overflow_s(self) -> float:
        return (self.overflow * UNIT + BESIDE) / PS


def _names(count: int) -> list[str]:
    return [f"r{index}" for index in range(count)]


def run_reference(scenario: Scenario, end: int) -> Reference:
    jobs = [
        Job(
            number=number,
            arrival=0 if scenario.closed_loop else arrival * UNIT,
            prompt=prompt,
            output=output,
            expected=expected,
            kind=kind,
            rank=rank * UNIT,
            session=session,
            tenant=f"t{scenario.owners[number][0]}" if scenario.weights else "",
            promise=scenario.promise(number),
        )
        for number, (arrival, prompt, output, expected, kind, rank, session) in enumerate(
            scenario.requests
        )
    ]
    reference = Reference(
        jobs,
        dispatch=replace(
            UNLIMITED,
            max_queued=scenario.max_queued,
            max_attempts=scenario.max_attempts,
            max_moves=scenario.max_moves,
            overflow_s=scenario.overflow_s,
            overload=scenario.overload,
            fair=scenario.fair,
        ),
        tiers=scenario.tiers,
        policy=scenario.policy,
        shares=scenario.shares,
        closed_loop=scenario.closed_loop,
    )
    reference.engines += [
        spec.engine(name)
        for spec, name in zip(scenario.replicas, _names(len(scenario.replicas)), strict=True)
    ]
    for operation in scenario.operations:
        reference.advance(operation.at * UNIT)
        engine = reference.engines[operation.replica]
        match operation.kind:
            case "drain":
                reference.drain(engine)
            case "hang":
                reference.hang(engine)
            case "crash" | "lose" if engine.phase != "gone":
                reference.remove(engine, replay=operation.kind == "crash")
            case "migrate":
                reference.migrate(jobs[operation.request], engine)
            case _:
                pass
    reference.advance(end * UNIT)
    return reference


def run_fleet(
    scenario: Scenario, end: int, *, compiled: bool, skip: bool = True, watch: bool = False
) -> SimulatedFleet:
    columns = list(zip(*scenario.requests, strict=True))
    kinds, late, urgency = np.array(columns[4]), None, None
    owners = scenario.owners or [(0, 0)] * len(scenario.requests)
    tenant, tier = np.array(owners, dtype=np.int64).T
    if scenario.tiers:
        kinds = 2 * tier + kinds
        expected = np.array(columns[3])
        late = late_after_s(scenario.overload, scenario.tiers, tier, expected)
        urgency = tier_shifts_s(OrderPolicy(), scenario.tiers, tier, expected)
    fleet = SimulatedFleet(
        RequestTable.of(
            np.array(columns[0]) * UNIT / PS,
            columns[1],
            columns[2],
            expected_output_tokens=columns[3],
            class_index=kinds,
            rank_s=np.array(columns[5]) * UNIT / PS,
            session=columns[6],
            tier=tier if scenario.tiers else None,
            late_after_s=late,
            tenant=tenant,
            urgency_s=urgency,
        ),
        classes=2 * max(1, len(scenario.tiers)),
        gateway=GatewayOptions(
            max_queued=scenario.max_queued,
            overflow_s=scenario.overflow_s,
            demote_after_s=scenario.overload.late_after_s,
            shed_after_s=scenario.overload.shed_after_s,
            prompt_s_per_token=None,
            max_attempts=scenario.max_attempts,
            max_moves=scenario.max_moves,
            fair=FairShares(
                weights=scenario.weights,
                reserve=scenario.reserve,
                active_s=scenario.active_s,
            )
            if scenario.weights
            else None,
        ),
        closed_loop=scenario.closed_loop,
        compiled=compiled,
        skip=skip,
    )
    names = _names(len(scenario.replicas))
    for spec, name in zip(scenario.replicas, names, strict=True):
        spec.add_to(fleet, name, scenario.replica_overload)
    fleet.set_routing(POLICIES[scenario.policy], scenario.routing())
    for operation in scenario.operations:
        fleet.advance(operation.at * UNIT / PS)
        name = names[operation.replica]
        if watch:
            fleet.observe()
        match operation.kind:
            case "drain":
                fleet.drain(name)
            case "hang":
                fleet.hang(name)
            case "crash" | "lose":
                fleet.remove(name, replay=operation.kind == "crash")
            case "migrate":
                fleet.migrate(operation.request, name)
            case _:
                pass
    fleet.advance(end * UNIT / PS)
    return fleet


_STATUSES = {
    "pending": Status.PENDING,
    "queued": Status.QUEUED,
    "waiting": Status.WAITING,
    "running": Status.RUNNING,
    "moving": Status.MOVING,
    "completed": Status.COMPLETED,
    "refused": Status.REFUSED,
    "shed": Status.SHED,
    "lost": Status.LOST,
}


def told_by_reference(reference: Reference) -> list[Any]:
    """Everything a request's row tells, and what each replica has done."""
    rows: list[Any] = [
        (
            *(job.number, _STATUSES[job.status], job.on),
            *(job.dispatched, job.first, job.finish),
            *(job.preemptions, job.replays, job.made, job.reused),
        )
        for job in reference.jobs
    ]
    rows += [(e.name, *reference.owed(e.name)) for e in reference.engines]
    if all(job.finish is not None for job in reference.jobs):
        # Of a jump, busy time is counted when its steps end.
        rows += [e.busy for e in reference.engines]
    return rows


def told_by_fleet(fleet: SimulatedFleet) -> list[Any]:
    """The same of a fleet."""
    results = fleet.results()

    def moment(seconds: float) -> int | None:
        return None if np.isnan(seconds) else round(seconds * PS)

    def served_by(replica: int) -> str:
        return results.replica_names[replica] if replica >= 0 else ""

    rows: list[Any] = [
        (
            *(n, Status(results.status[n]), served_by(results.replica[n])),
            *(moment(results.dispatch_s[n]), moment(results.first_token_s[n])),
            moment(results.finish_s[n]),
            *(int(results.preemptions[n]), int(results.replays[n])),
            *(int(results.made_tokens[n]), int(results.reused_tokens[n])),
        )
        for n in range(len(results.status))
    ]
    rows += [(name, *fleet.outstanding(name)) for name in results.replica_names]
    if fleet.ended == len(results.status):
        rows += [round(totals.busy_s * PS) for totals in results.totals]
    return rows


# -- strategies ---------------------------------------------------------------------------------
_round = st.integers(0, 40).map(lambda n: 50 * n)
_burst = st.integers(0, 12).map(lambda n: 25 * n)
PRECISIONS = [Precision.BF16, Precision.FP8]
_weights = st.tuples(*[st.sampled_from([0.5, 1.0, 2.0])] * 3)
_tiers = st.lists(
    st.builds(
        Tier,
        name=st.just(""),
        ttft_s=st.sampled_from([None, 80, 320]).map(
            lambda units: None if units is None else (units * UNIT + BESIDE) / PS
        ),
        precisions=st.sampled_from([(), (), (Precision.BF16,)]),
        weight=st.sampled_from([1.0, 2.0]),
        overload=st.sampled_from(
            [OverloadAction.DEMOTE, OverloadAction.DEMOTE, OverloadAction.FIRST]
        ),
    ),
    min_size=1,
    max_size=3,
).map(lambda found: tuple(replace(tier, name=f"tier{n}") for n, tier in enumerate(found)))
_LIVE_OPERATIONS = ["drain", "hang", "crash", "crash", "crash", "lose"]
_OPERATIONS = ["look", *_LIVE_OPERATIONS, *["migrate"] * 6]


# Plain; a state beside attention; windows beside attention; windows, or states, alone.
LAYOUTS = (
    *[PLAIN] * 4,
    Layout(size=40, states=2),
    Layout(size=16, windows=2, window=32, states=2),
    Layout(size=7, tables=2, windows=1, window=20, window_size=5),
    Layout(tables=0, windows=2, window=48),
    Layout(tables=0, states=3),
)


def with_room(spec: Spec) -> Spec:
    """Each request fits, of at most 120 tokens, which the live router takes for granted."""
    longest = Job(number=0, arrival=0, prompt=60, output=60, expected=60)
    return replace(spec, kv_blocks=spec.kv_blocks - 8 + max(8, spec.layout.whole(longest)))


def specs(*, roles: bool, stages: bool) -> st.SearchStrategy[Spec]:
    seqs = st.integers(1, 6)
    return seqs.flatmap(
        lambda most: st.builds(
            Spec,
            seqs=st.just(most),
            budget=st.sampled_from([most, most + 1, 16, 40, 100]).map(lambda b: max(b, most)),
            kv_blocks=st.integers(8, 20),
            stages=st.sampled_from([1, 2, 3] if stages else [1]),
            role=st.sampled_from(list(Role) if roles else [Role.BOTH]),
            ordered=st.booleans(),
            max_inflight=st.sampled_from([most, 2 * most, 20]),
            base=st.sampled_from([50, 70, 100]),
            per_token=st.sampled_from([1, 2, 5]),
            per_seq=st.sampled_from([0, 1, 10]),
            kv_rate=st.sampled_from([0, 1, 3]),
            pair_rate=st.sampled_from([0, 100, 1024]),
            cost=st.sampled_from([1, 2]),
            link=st.sampled_from([0, 1, 10]),
            latency=st.sampled_from([0, 50, 300]),
            ready_at=st.sampled_from([0, 0, 0, 500]),
            layout=st.sampled_from(LAYOUTS),
        ).map(with_room)
    )


@st.composite
def scenarios(
    draw: st.DrawFn,
    *,
    replicas: int = 1,
    roles: bool = False,
    stages: bool = False,
    sessions: bool = False,
    gateway: bool = False,
    operations: bool = False,
    live: bool = False,
    tenants: bool = False,
    tiers: bool = False,
) -> Scenario:
    """``live``: the live router under load, with replicas that leave, hang and break down."""
    count = draw(st.integers(8 if live else 1, 32 if live else 24))
    lengths = st.sampled_from([1, 2, 5, 15, 16, 17, 30, 33, 60])
    requests = []
    arrivals = _burst if live else _round
    for arrival in sorted(draw(st.lists(arrivals, min_size=count, max_size=count))):
        prompt, output = draw(lengths), draw(lengths)
        rank = arrival + draw(st.sampled_from([0, 0, 50, 100]))
        session = draw(st.integers(-1, 2)) if sessions else -1
        requests.append(
            (arrival, prompt, output, draw(lengths), draw(st.integers(0, 1)), rank, session)
        )
    least = 2 if live else 1
    fleet = draw(st.lists(specs(roles=roles, stages=stages), min_size=least, max_size=replicas))
    names = _names(len(fleet))
    policy = "pools" if live else draw(st.sampled_from(list(POLICIES)))
    if policy == "freeness":
        # The reference of that policy counts plain blocks.
        fleet = [replace(spec, layout=PLAIN) for spec in fleet]
    shares = draw(
        st.dictionaries(
            st.integers(0, 1), st.dictionaries(st.sampled_from(names), st.sampled_from([0.3, 0.7]))
        )
    )
    closed = draw(st.sampled_from([0, 0, 1, 3])) if gateway and not live else 0
    ttft = draw(st.sampled_from([None, 40, 80, 160, 640])) if gateway else None
    shed = draw(st.sampled_from([None, 200, 500, 1500])) if gateway and not closed else None
    asked: list[Operation] = []
    if operations:
        asked = draw(
            st.lists(
                st.builds(
                    Operation,
                    # At any time, and often at the very end of a step.
                    at=st.one_of(st.integers(0, 3000), st.integers(0, 60).map(lambda n: 50 * n)),
                    kind=st.sampled_from(_LIVE_OPERATIONS if live else _OPERATIONS),
                    replica=st.integers(0, len(fleet) - 1),
                    request=st.integers(0, count - 1),
                ),
                max_size=6,
            )
        )
    owners: list[tuple[int, int]] = []
    promises: tuple[Tier, ...] = ()
    if tiers:
        promises = draw(_tiers)
        fleet = [replace(spec, precision=draw(st.sampled_from(PRECISIONS))) for spec in fleet]
    if tenants or tiers:
        tier = st.integers(0, max(0, len(promises) - 1))
        owner = st.tuples(st.integers(0, 2), tier)
        owners = draw(st.lists(owner, min_size=count, max_size=count))
    return Scenario(
        owners=owners,
        tiers=promises,
        weights=draw(_weights) if tenants else (),
        reserve=draw(st.sampled_from([0.0, 0.1, 0.5])),
        active=draw(st.sampled_from([0, 100, 10**6])),
        requests=requests,
        replicas=fleet,
        policy=policy,
        shares=shares,
        operations=sorted(asked, key=lambda item: item.at),
        overflow=draw(st.sampled_from([0, 100, 10**6])),
        max_queued=draw(st.sampled_from([0, 3, 1000])) if gateway else 1000,
        ttft=ttft,
        # Nothing is shed before it could be demoted.
        shed=None if shed is None else max(shed, ttft or 0),
        closed_loop=closed,
        max_attempts=draw(st.sampled_from([1, 2, 10**6])) if operations else 10**6,
        max_moves=draw(st.sampled_from([0, 1, 10**6])) if operations else 10**6,
    )
