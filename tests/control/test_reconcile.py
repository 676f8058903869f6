"""Reconcile reaches any plan from any state, under lost, repeated and failing actions."""

import asyncio
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from oserve.control.loop import ControlLoop
from oserve.control.reconcile import ReconcilePolicy, given_up, reconcile, restart_wait_s
from oserve.core import (
    DeploymentPlan,
    Device,
    DrainReplica,
    LengthClass,
    Observation,
    ReplicaPhase,
    ReplicaShape,
    ReplicaSpec,
    StartFailures,
    StartReplica,
    StopReplica,
    VirtualClock,
)
from oserve.sim import Faults, SimulatedCluster

DEVICES = tuple(Device(id=f"d{index}", kind="cpu") for index in range(6))
POLICY = ReconcilePolicy()


def plan_of(*groups: tuple[str, ...], name: str = "p") -> DeploymentPlan:
    replicas = tuple(
        ReplicaSpec(
            id=f"{name}-{index}",
            shape=ReplicaShape(tensor_parallel_size=len(devices)),
            devices=devices,
        )
        for index, devices in enumerate(groups)
    )
    return DeploymentPlan(
        id=name,
        replicas=replicas,
        length_classes=(LengthClass(name="all"),),
        routing_shares={"all": {spec.id: 1 / len(replicas) for spec in replicas}},
    )


@st.composite
def plans(draw: st.DrawFn, name: str) -> DeploymentPlan:
    order = draw(st.permutations([device.id for device in DEVICES]))
    groups: list[tuple[str, ...]] = []
    while order and len(groups) < 4:
        size = draw(st.sampled_from([1, 1, 2, 4]))
        if size > len(order):
            break
        groups.append(tuple(order[:size]))
        order = order[size:]
    return plan_of(*groups, name=name)


probabilities = st.sampled_from([0.0, 0.2, 0.5])


@settings(max_examples=50, deadline=None)
@given(
    plans("a"),
    plans("b"),
    st.builds(
        Faults,
        lost_action=probabilities,
        repeated_action=probabilities,
        failed_start=st.sampled_from([0.0, 0.3]),
        seed=st.integers(0, 1000),
    ),
    st.lists(st.integers(0, 3), max_size=3),
)
def test_reaches_the_plan_from_any_state(
    first: DeploymentPlan, second: DeploymentPlan, faults: Faults, crashes: list[int]
) -> None:
    async def scenario() -> None:
        clock = VirtualClock()
        cluster = SimulatedCluster(DEVICES, clock, faults=faults)
        policy = ReconcilePolicy(max_failures=1000, max_backoff_s=2.0)
        loop = ControlLoop(cluster, clock, first, policy=policy)
        for index in range(20):
            await loop.step()
            await clock.advance(0.5)
            if index in crashes:
                cluster.crash(f"a-{index}")
        loop.plan = second
        for _ in range(150):
            await loop.step()
            await clock.advance(0.5)
        # A fault may still be striking at any one moment: with the faults over, it must settle.
        cluster.faults = Faults()
        for _ in range(40):
            await loop.step()
            await clock.advance(0.5)
        observation = await cluster.observe()
        alive = [s for s in observation.replicas if s.phase is not ReplicaPhase.GONE]
        assert {state.spec for state in alive} == set(second.replicas)
        assert {state.phase for state in alive} == {ReplicaPhase.READY}
        assert reconcile(second, observation, policy) == ()

    asyncio.run(scenario())


def test_a_replica_that_cannot_start_is_given_up_not_retried_for_ever() -> None:
    async def scenario() -> int:
        clock = VirtualClock()
        cluster = SimulatedCluster(DEVICES, clock, faults=Faults(failed_start=1.0))
        plan = plan_of(("d0",))
        starts = 0
        loop = ControlLoop(cluster, clock, plan, policy=POLICY)
        for _ in range(1000):
            actions = await loop.step()
            starts += sum(isinstance(action, StartReplica) for action in actions)
            await clock.advance(0.5)
        assert list(given_up(plan, await cluster.observe(), POLICY)) == ["p-0"]
        return starts

    assert asyncio.run(scenario()) == POLICY.max_failures


def observation_of(
    plan: DeploymentPlan, phase: ReplicaPhase, *, since_s: float = 0.0, now_s: float = 0.0
) -> Observation:
    async def build() -> Observation:
        cluster = SimulatedCluster(DEVICES, VirtualClock())
        for spec in plan.replicas:
            await cluster.apply(StartReplica(spec=spec))
        return await cluster.observe()

    observed = asyncio.run(build())
    states = tuple(replace(s, phase=phase, since_s=since_s) for s in observed.replicas)
    return replace(observed, replicas=states, now_s=now_s)


def test_what_is_not_wished_for_drains_then_stops() -> None:
    old, new = plan_of(("d0",), name="old"), plan_of(("d0",), name="new")
    ready = observation_of(old, ReplicaPhase.READY)
    assert reconcile(new, ready, POLICY) == (DrainReplica(replica="old-0"),)
    loading = observation_of(old, ReplicaPhase.LOADING)
    assert reconcile(new, loading, POLICY) == (StopReplica(replica="old-0"),)
    draining = observation_of(old, ReplicaPhase.DRAINING, now_s=10.0)
    assert reconcile(new, draining, POLICY) == (StopReplica(replica="old-0"),)
    busy = replace(draining, replicas=tuple(replace(s, running=1) for s in draining.replicas))
    assert reconcile(new, busy, POLICY) == ()
    late = replace(busy, now_s=POLICY.drain_limit_s)
    assert reconcile(new, late, POLICY) == (StopReplica(replica="old-0"),)


def test_backoff_doubles_up_to_its_bound() -> None:
    spec = plan_of(("d0",)).replicas[0]
    policy = ReconcilePolicy(max_failures=100)

    def wait(count: int) -> float:
        failures = StartFailures(spec=spec, count=count, last_s=0.0, reason="x")
        observation = Observation(
            now_s=0.0, devices=DEVICES, replicas=(), failures={spec.id: failures}
        )
        return restart_wait_s(spec, observation, policy)

    assert [wait(count) for count in (1, 2, 3, 50)] == [1.0, 2.0, 4.0, 60.0]


def test_a_changed_spec_starts_with_a_clean_sheet() -> None:
    plan = plan_of(("d0",))
    spec = plan.replicas[0]
    failures = StartFailures(spec=spec, count=99, last_s=0.0, reason="x")
    observation = Observation(now_s=0.0, devices=DEVICES, replicas=(), failures={spec.id: failures})
    assert reconcile(plan, observation, POLICY) == ()
    changed = replace(spec, shape=replace(spec.shape, max_num_seqs=1))
    again = replace(plan, replicas=(changed,))
    assert reconcile(again, observation, POLICY) == (StartReplica(spec=changed),)
