"""Decisions about nodes: what is left is planned for at once, and what comes back is used again."""

from dataclasses import replace

import pytest

from oserve.control.decision import Decision, DecisionVerdict, Reason, Trigger
from oserve.control.following import FollowPolicy
from oserve.control.ladder_cut import largest_part
from oserve.control.loop import ControlLoop
from oserve.control.node_view import NodeView
from oserve.control.nodes import NodeBook, NodePolicy
from oserve.control.plan_parts import extended, fitting
from oserve.control.policy import ControlPolicy
from oserve.control.reconcile import ReconcilePolicy
from oserve.control.runtime import ControllerRuntime
from oserve.control.starts import StartTimes
from oserve.core import (
    DeploymentPlan,
    Device,
    NodePhase,
    NodeSighting,
    NodeState,
    Observation,
    ReplicaPhase,
    VirtualClock,
)
from oserve.sim import Faults, Phases, SimulatedCluster
from oserve.sim.phases import NodeLoss

from . import ladders, toy
from .ladders import everywhere, plan_for, rung, shape

LOST = NodeState(
    name="n1", phase=NodePhase.LOST, startable=False, usable=False, reachable=False, reason="gone"
)
DRAINED = NodeState(
    name="n1", phase=NodePhase.DRAINING, word="draining", startable=False, usable=False
)
CORDONED = replace(DRAINED, phase=NodePhase.CORDONED, word="cordoned")
BACK = NodeState(name="n1")
DEVICES = tuple(replace(device, node=f"n{n // 2}") for n, device in enumerate(toy.DEVICES))


def seen(runtime: ControllerRuntime, now_s: float, node: NodeState) -> Trigger | None:
    observation = Observation(now_s=now_s, devices=DEVICES, replicas=(), node_states=(node,))
    return runtime.observe(now_s, (), observation)


def toy_runtime(plan: DeploymentPlan | None = None) -> ControllerRuntime:
    planner = toy.planner()
    rates = (2.0, 4.0)
    types = tuple(
        replace(kind, arrival_rate_rps=rate) for kind, rate in zip(toy.TYPES, rates, strict=True)
    )
    planner.learn(replace(planner.facts, devices=DEVICES, types=types))
    return ControllerRuntime(
        plan or toy.plan_of(0, 0, 0, 1),
        policy=ControlPolicy(interval_s=20, min_dwell_s=1000.0),
        planner=planner,
        starts=StartTimes(20.0),
        shares_interval_s=5.0,
        # A simulation takes longer than there is time.
        scorer=lambda _inputs, _score: pytest.fail("it must not be asked"),
    )


def devices_of(plan: DeploymentPlan) -> set[str]:
    return {device for spec in plan.replicas for device in spec.devices}


def decided(runtime: ControllerRuntime, now_s: float, node: NodeState) -> Decision:
    assert seen(runtime, now_s, node) is Trigger.NODE
    decision, _ = runtime.decide(now_s, Trigger.NODE)
    # Once decided it is not due again.
    assert seen(runtime, now_s + 1.0, node) is not Trigger.NODE
    return decision


@pytest.mark.parametrize("node", [LOST, DRAINED])
def test_what_is_left_is_planned_for_at_once_and_what_returns_is_used(node: NodeState) -> None:
    # The two replicas that are left suit one type, and nobody has asked for anything yet.
    runtime = toy_runtime()
    before = runtime.controller.plan
    decision = decided(runtime, 100.0, node)
    assert decision.reason is Reason.NODES_CHANGED
    left = runtime.controller.plan
    assert devices_of(left) <= {"d0", "d1"}
    assert {spec.shape for spec in left.replicas} == {row.shape for row in toy.TABLE}
    # Soon after that switch, and although nobody asks for more.
    decision = decided(runtime, 110.0, BACK)
    assert decision.verdict is DecisionVerdict.SWITCH
    assert devices_of(runtime.controller.plan) == devices_of(before)
    assert {spec.id for spec in left.replicas} <= {
        spec.id for spec in runtime.controller.plan.replicas
    }


def test_a_plan_that_needs_no_other_stays_and_serves_with_what_is_left() -> None:
    runtime = toy_runtime(toy.plan_of(0, 1, 0, 1))
    plan = runtime.controller.plan
    assert decided(runtime, 100.0, LOST).verdict is DecisionVerdict.KEEP
    assert runtime.controller.plan is plan
    assert devices_of(runtime.controller.present) == {"d0", "d1"}
    assert decided(runtime, 200.0, BACK).verdict is DecisionVerdict.KEEP
    assert runtime.controller.present is plan


def test_the_replicas_of_a_cordoned_node_stay() -> None:
    runtime = toy_runtime()
    decided(runtime, 100.0, CORDONED)
    stay = {spec for spec in runtime.controller.plan.replicas if spec.devices[0] in {"d2", "d3"}}
    assert stay == set(toy.plan_of(0, 0, 0, 1).replicas[2:])


def test_an_operators_plan_is_held() -> None:
    runtime = toy_runtime()
    given = toy.plan_of(1, 1, 1, 1)
    inputs = runtime.controller.decision_input(50.0, given=given)
    score = runtime.evaluate(inputs)
    runtime.controller.decide(inputs, score, now_s=50.0, trigger=Trigger.MANUAL)
    held = runtime.controller.plan
    decision = decided(runtime, 100.0, LOST)
    assert (decision.verdict, runtime.controller.plan) == (DecisionVerdict.KEEP, held)


def test_a_switch_under_way_only_puts_it_off() -> None:
    runtime = toy_runtime()
    assert seen(runtime, 100.0, LOST) is Trigger.NODE
    decision, _ = runtime.decide(100.0, Trigger.NODE, switching=True)
    assert decision.reason is Reason.SWITCH_UNDER_WAY
    assert seen(runtime, 101.0, LOST) is Trigger.NODE


def test_types_that_nothing_left_can_serve_do_not_keep_others_waiting() -> None:
    planner = toy.planner()
    wide = replace(toy.TABLE[1].shape, tensor_parallel_size=2)
    table = (replace(toy.TABLE[0], capacity_rps=(8.0, 0.0)), replace(toy.TABLE[1], shape=wide))
    planner.learn(replace(planner.facts, devices=DEVICES, table=table))
    planner.leave_out(frozenset({"d1", "d2", "d3"}))
    (found,) = planner.candidates((4.0, 1.0), toy.plan_of())
    assert [spec.shape for spec in found.replicas] == [toy.TABLE[0].shape]
    planner.leave_out(frozenset({"d0", "d1", "d2", "d3"}))
    assert planner.candidates((4.0, 1.0), toy.plan_of()) == ()


def test_all_nodes_may_be_lost() -> None:
    runtime = toy_runtime()
    states = tuple(replace(LOST, name=f"n{n}") for n in (0, 1))
    observation = Observation(now_s=1.0, devices=(), replicas=(), node_states=states)
    assert runtime.observe(1.0, (), observation) is Trigger.NODE
    decision, score = runtime.decide(1.0, Trigger.NODE)
    assert (decision.verdict, score) == (DecisionVerdict.KEEP, None)


async def test_a_loss_and_a_return_under_the_real_loop() -> None:
    """Judgement, decision, roll-out and return, as a server puts them together."""
    runtime, clock = toy_runtime(), VirtualClock()
    before = runtime.controller.plan
    loss = NodeLoss(node="n1", at_s=30.0, back_s=100.0)
    cluster = SimulatedCluster(
        DEVICES, clock, phases=Phases(start_s=5.0), faults=Faults(node_losses=(loss,))
    )
    rounds: list[Observation] = []
    loop = ControlLoop(
        cluster,
        clock,
        before,
        policy=ReconcilePolicy(),
        observed=lambda seen, _: rounds.append(seen),
        nodes=NodeView(NodeBook(NodePolicy(hold_s=20.0))),
    )
    decisions: list[tuple[float, Decision]] = []
    while clock.now() < 200.0:
        await loop.step()
        trigger = runtime.observe(clock.now(), (), rounds[-1])
        if trigger is Trigger.NODE:
            decision, _ = runtime.decide(clock.now(), trigger)
            decisions.append((clock.now(), decision))
            if decision.verdict is DecisionVerdict.SWITCH:
                loop.plan = runtime.controller.plan
        await clock.advance(1.0)
    ready = {
        round(seen.now_s): {s.spec for s in seen.replicas if s.phase is ReplicaPhase.READY}
        for seen in rounds
    }
    assert [at_s for at_s, _ in decisions] == [35.0, 120.0]
    assert {spec.devices[0] for spec in ready[35]} == {"d0", "d1"}
    # Both kinds serve on what is left, and nothing of that is given up when the node is back.
    left = ready[60]
    assert {spec.shape for spec in left} == {row.shape for row in toy.TABLE}
    assert all(left <= serving for at_s, serving in ready.items() if at_s >= 60)
    assert {spec.devices[0] for spec in ready[130]} == {"d0", "d1", "d2", "d3"}


# -- ladders --------------------------------------------------------------------------------------
def test_the_ladder_is_cut_to_the_devices_in_use() -> None:
    follower = ladders.follower(
        everywhere(4),
        ladders.three_rungs(),
        follow=FollowPolicy(goal=ladders.LATENCY, fall_after_s=30.0),
    )
    follower.runtime.planner.learn(follower.runtime.planner.facts)
    try:
        follower.run(lambda _: 0.3, 60, seed=None)
        runtime, now_s = follower.runtime, 1060.0
        observation = Observation(
            now_s=now_s, devices=ladders.DEVICES, replicas=(), node_states=(LOST,)
        )
        assert runtime.observe(now_s, (), observation) is Trigger.NODE
        decision, _ = runtime.decide(now_s, Trigger.NODE)
        # Four devices in one replica no longer hold 0.3 of the load of eight; smaller ones do.
        assert decision.reason is Reason.NODES_CHANGED
        plan = runtime.controller.plan
        assert devices_of(plan) <= {device.id for device in ladders.DEVICES[:4]}
        assert max(spec.shape.device_count for spec in plan.replicas) < 4
        observation = replace(observation, node_states=(BACK,), now_s=now_s + 100.0)
        assert runtime.observe(now_s + 100.0, (), observation) is Trigger.NODE
        runtime.decide(now_s + 100.0, Trigger.NODE)
        assert devices_of(runtime.controller.plan) == {device.id for device in ladders.DEVICES}
    finally:
        follower.runtime.planner.leave_out(frozenset())


def test_the_largest_part_of_a_deployment() -> None:
    fits = fitting(ladders.DEVICES[:6])
    mixed = ((shape(1), 4), (shape(4), 1))
    assert dict(largest_part(mixed, fits)) == {shape(1): 2, shape(4): 1}
    assert largest_part(everywhere(4), fitting(())) == ()
    assert rung(mixed, 0.5, 1.0).shapes == mixed


def test_replicas_that_return_get_ids_of_their_own() -> None:
    earlier = plan_for(everywhere(4))
    current = replace(earlier, replicas=(replace(earlier.replicas[0], id="first4"),))
    found = extended(current, earlier, ladders.DEVICES)
    assert found is not None
    assert [spec.id for spec in found.replicas] == ["first4", "first4-0"]
    assert extended(earlier, earlier, ladders.DEVICES) is None


def test_a_node_that_comes_is_planned_for() -> None:
    runtime = toy_runtime()
    kind = DEVICES[0].kind
    fresh = Device(id="n9/cpu:0", kind=kind, node="n9", memory_bytes=DEVICES[0].memory_bytes)
    observation = Observation(
        now_s=1.0, devices=(*DEVICES, fresh), replicas=(), node_states=(BACK, NodeState(name="n9"))
    )
    assert runtime.observe(1.0, (), observation) is Trigger.NODE
    assert fresh in runtime.planner.devices
    runtime.controller.accept_nodes()
    assert runtime.observe(2.0, (), observation) is not Trigger.NODE
    # Once all is known that plans for it need, it is decided about again.
    runtime.renew(runtime.planner.facts)
    assert runtime.observe(3.0, (), observation) is Trigger.NODE
    runtime.decide(3.0, Trigger.NODE)
    assert runtime.observe(4.0, (), observation) is not Trigger.NODE


def test_a_ladder_for_the_node_that_came_makes_a_decision_due() -> None:
    follower = ladders.follower(
        everywhere(4),
        ladders.three_rungs(),
        follow=FollowPolicy(goal=ladders.LATENCY, fall_after_s=30.0),
    )
    follower.run(lambda _: 0.3, 60, seed=None)
    runtime, now_s = follower.runtime, 1060.0
    old = runtime.shelf.ladder
    observation = Observation(
        now_s=now_s, devices=ladders.DEVICES, replicas=(), node_states=(BACK,)
    )
    runtime.renew(runtime.planner.facts)
    # The new node serves nothing before there is a ladder that has it.
    assert runtime.observe(now_s, (), observation) is not Trigger.NODE
    need = runtime.ladder_need(now_s)
    assert need is not None
    assert need.cluster == 1
    assert runtime.shelf.ladder is old
    assert runtime.ladder_need(now_s + 1.0) is None
    runtime.learn_ladder(need, ladders.three_rungs())
    assert runtime.observe(now_s + 1.0, (), observation) is Trigger.NODE
    runtime.decide(now_s + 1.0, Trigger.NODE)
    assert runtime.observe(now_s + 2.0, (), observation) is not Trigger.NODE
    # Another ladder of the same cluster, for another mix, is no reason.
    runtime.learn_ladder(need, ladders.three_rungs())
    assert runtime.observe(now_s + 3.0, (), observation) is not Trigger.NODE


def test_a_node_that_came_and_flaps_is_held_down_like_others() -> None:
    runtime = toy_runtime()
    view = NodeView(NodeBook(NodePolicy(hold_s=20.0)))
    fresh = replace(DEVICES[0], id="n9/cpu:0", node="n9")

    def look(now_s: float, *, dead: str = "") -> None:
        sightings = tuple(NodeSighting(name=name) for name in ("n0", "n1"))
        seen = Observation(
            now_s=now_s,
            devices=(*DEVICES, fresh),
            replicas=(),
            nodes=(*sightings, NodeSighting(name="n9", dead=dead)),
        )
        runtime.observe(now_s, (), view.judge(seen))

    look(1.0)
    assert fresh in runtime.planner.devices
    look(2.0, dead="its power was cut")
    runtime.renew(runtime.planner.facts)
    look(3.0)
    assert fresh in runtime.planner.facts.devices
    # It is back, and known; but nothing is planned there before the hold-down is over.
    assert fresh not in runtime.planner.devices
    look(24.0)
    assert fresh in runtime.planner.devices
