"""The live control loop on a simulated cluster whose replicas serve."""

import asyncio

from oserve.control.loop import ControlLoop
from oserve.control.reconcile import ReconcilePolicy
from oserve.core import (
    DeploymentPlan,
    Device,
    LengthClass,
    ReplicaPhase,
    ReplicaShape,
    ReplicaSpec,
    VirtualClock,
)
from oserve.perf.model import find_model
from oserve.perf.source import RooflineSource
from oserve.sim import (
    Faults,
    Fleet,
    Phases,
    RequestTable,
    SimulatedCluster,
    Status,
    replica_model,
)
from oserve.traces import synthesise

DEVICES = tuple(Device(id=f"gpu:{n}", kind="H100") for n in range(4))
MODEL = replica_model(RooflineSource(find_model("llama-2-70b")), ordered=True)
POLICY = ReconcilePolicy(max_failures=1000, max_backoff_s=2.0)
COUNT = 150


def plan_of(name: str, *groups: tuple[int, ...]) -> DeploymentPlan:
    replicas = tuple(
        ReplicaSpec(
            id=f"{name}-{index}",
            shape=ReplicaShape(
                tensor_parallel_size=len(group), max_num_seqs=64, device_kind="H100"
            ),
            devices=tuple(f"gpu:{n}" for n in group),
        )
        for index, group in enumerate(groups)
    )
    return DeploymentPlan(
        id=name,
        replicas=replicas,
        workload_types=(LengthClass(name="all"),),
        routing_shares={"all": {spec.id: 1 / len(replicas) for spec in replicas}},
    )


def serve(faults: Faults) -> tuple[Fleet, list[tuple[float, int]]]:
    """Two replicas become one, while requests come; what was ready when."""
    made = synthesise(rate_rps=2.0, duration_s=1e6, seed=3)
    trace = [request for request, _ in zip(made, range(COUNT), strict=False)]
    fleet = Fleet(RequestTable.from_trace(trace), compiled=False)
    seen: list[tuple[float, int]] = []

    async def scenario() -> None:
        clock = VirtualClock()
        cluster = SimulatedCluster(
            DEVICES,
            clock,
            phases=Phases(start_s=1.0, load_s=3.0, warm_s=1.0, stop_s=0.5),
            faults=faults,
            fleet=fleet,
            model=MODEL,
        )
        first, second = plan_of("a", (0, 1), (2, 3)), plan_of("b", (0, 1, 2, 3))
        loop = ControlLoop(
            cluster,
            clock,
            first,
            policy=POLICY,
            observed=lambda observation, _: seen.append(
                (
                    observation.now_s,
                    sum(s.phase is ReplicaPhase.READY for s in observation.replicas),
                )
            ),
        )
        cluster.route(first)
        running = asyncio.create_task(loop.run())
        await clock.advance(30.0)
        loop.plan = second
        cluster.route(second)
        await clock.advance(600.0)
        running.cancel()
        await cluster.observe()

    asyncio.run(scenario())
    return fleet, seen


def test_the_loop_switches_plans_while_requests_are_served() -> None:
    fleet, seen = serve(Faults())
    results = fleet.results()
    assert (results.status == Status.COMPLETED).all()
    assert results.replica_names == ("a-0", "a-1", "b-0")
    assert set(results.replica.tolist()) == {0, 1, 2}
    ready = dict(seen)
    assert ready[4.5] == 0
    assert ready[5.0] == 2
    assert results.first_token_s.min() > 5.0
    # Nothing is thrown away: the old replicas drain before they stop.
    assert results.replays.sum() == 0


def test_whatever_goes_wrong_every_request_is_served_in_the_end() -> None:
    faults = Faults(
        lost_action=0.2,
        repeated_action=0.2,
        failed_start=0.3,
        slow_start=0.3,
        stale_observation=0.2,
        crashes=((12.0, "a-0"), (60.0, "b-0")),
        seed=5,
    )
    fleet, _ = serve(faults)
    results = fleet.results()
    assert (results.status == Status.COMPLETED).all()
    assert results.replays.sum() > 0


def test_the_same_seed_gives_the_same_run() -> None:
    faults = Faults(failed_start=0.3, slow_start=0.5, crashes=((20.0, "a-1"),), seed=1)
    one, other = serve(faults)[0].results(), serve(faults)[0].results()
    assert (one.finish_s == other.finish_s).all()
