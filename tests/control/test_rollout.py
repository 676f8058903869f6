"""Roll-out: stage by stage, never a device twice, never all at once without need."""

from hypothesis import given, settings

from oserve.control.loop import ControlLoop
from oserve.control.reconcile import ReconcilePolicy
from oserve.control.rollout import settled, staged, stages
from oserve.core import DeploymentPlan, ReplicaPhase, ReplicaShape, ReplicaSpec, VirtualClock
from oserve.sim import SimulatedCluster

from .test_reconcile import DEVICES, plan_of, plans


@given(plans("a"), plans("b"))
def test_the_stages_lead_from_one_plan_to_the_other(a: DeploymentPlan, b: DeploymentPlan) -> None:
    there = list(a.replicas)
    for stage in stages(a.replicas, b.replicas):
        assert stage.retired or stage.started
        there = [spec for spec in there if spec not in stage.retired] + list(stage.started)
        devices = [device for spec in there for device in spec.devices]
        assert len(devices) == len(set(devices))
    assert {spec.id for spec in there} == {spec.id for spec in b.replicas}


@settings(max_examples=30, deadline=None)
@given(plans("a"), plans("b"))
async def test_capacity_stays_while_it_can(a: DeploymentPlan, b: DeploymentPlan) -> None:
    clock = VirtualClock()
    cluster = SimulatedCluster(DEVICES, clock)
    loop = ControlLoop(cluster, clock, a, policy=ReconcilePolicy())

    async def rounds(count: int) -> list[int]:
        ready = []
        for _ in range(count):
            await loop.step()
            await clock.advance(0.5)
            states = (await cluster.observe()).replicas
            ready.append(sum(len(s.spec.devices) for s in states if s.phase is ReplicaPhase.READY))
        return ready

    await rounds(12)
    loop.plan = b
    ready = await rounds(200)
    observation = await cluster.observe()
    assert settled(b, observation, frozenset())
    steps = stages(a.replicas, b.replicas)
    if len(steps) > 1:
        # What serves through a stage is what the stage leaves.
        there = list(a.replicas)
        least = 10**6
        for step in steps:
            there = [spec for spec in there if spec not in step.retired]
            least = min(least, sum(len(spec.devices) for spec in there))
            there += step.started
        assert min(ready) >= least


def test_one_of_many_goes_first() -> None:
    old = plan_of(*((device.id,) for device in DEVICES), name="a")
    new = plan_of(*((device.id,) for device in DEVICES), name="b")
    steps = stages(old.replicas, new.replicas)
    assert [len(step.retired) for step in steps] == [1] * 6


async def test_a_shape_that_cannot_start_is_not_rolled_out_further() -> None:
    clock = VirtualClock()
    cluster = SimulatedCluster(DEVICES, clock)
    old = plan_of(("d0",), ("d1",), ("d2",), name="a")
    loop = ControlLoop(cluster, clock, old, policy=ReconcilePolicy(max_failures=2))
    for _ in range(12):
        await loop.step()
        await clock.advance(0.5)
    shape = ReplicaShape(max_num_seqs=7)
    new = DeploymentPlan(
        id="b",
        replicas=tuple(ReplicaSpec(id=f"b{n}", shape=shape, devices=(f"d{n}",)) for n in range(3)),
        length_classes=old.length_classes,
        routing_shares={"all": {"b0": 1.0}},
    )
    loop.plan = new
    for _ in range(100):
        await loop.step()
        await clock.advance(0.5)
        for state in (await cluster.observe()).replicas:
            if state.spec.shape == shape and state.phase is ReplicaPhase.LOADING:
                cluster.crash(state.spec.id)
    observation = await cluster.observe()
    ready = [s.spec.id for s in observation.replicas if s.phase is ReplicaPhase.READY]
    assert len(ready) == 2
    assert settled(new, observation, frozenset({"b0", "b1", "b2"}))
    assert staged(new, observation, frozenset({"b0"})).replica(ready[0]) is not None
