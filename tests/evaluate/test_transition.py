"""A switch on a simulated fleet: no request is lost, and replicas serve only in their time."""

from collections.abc import Sequence

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from oserve.control.evaluation import Leg
from oserve.core import DeploymentPlan, LengthClass, ReplicaShape, ReplicaSpec
from oserve.evaluate.capacities import LengthSamples
from oserve.evaluate.simulator import Levers, Routing, SimulatedServing, SimulatedTraffic, Simulator
from oserve.evaluate.transition import RoutedLeg, TimedSwitch, simulate_switches
from oserve.perf.known_models import find_model
from oserve.perf.source import RooflineSource
from oserve.sim.results import FleetResults
from oserve.sim.types import Status

SIMULATOR = Simulator(RooflineSource(find_model("qwen3-32b")))
CLASSES = (LengthClass(name="all", output_tokens=40),)
AT_S = 10.0


def spec(name: str, tp: int, first: int) -> ReplicaSpec:
    shape = ReplicaShape(
        tensor_parallel_size=tp, max_num_batched_tokens=512, max_num_seqs=64, device_kind="H100"
    )
    return ReplicaSpec(id=name, shape=shape, devices=tuple(f"d{first + n}" for n in range(tp)))


OLD = (spec("a", 2, 0), spec("b", 2, 2))
NEW = (spec("c", 2, 0), spec("d", 2, 2))


def plan(*replicas: ReplicaSpec) -> DeploymentPlan:
    even = {item.id: 1.0 / len(replicas) for item in replicas}
    return DeploymentPlan(
        id="x", replicas=replicas, length_classes=CLASSES, routing_shares={"all": even}
    )


def serving(routing: Routing) -> SimulatedServing:
    return SimulatedServing(plan=plan(*OLD), levers=Levers(routing=routing))


def traffic(rate_rps: float, seed: int) -> SimulatedTraffic:
    lengths = LengthSamples(prompt_tokens=np.array([300, 2000]), output_tokens=np.array([40, 200]))
    made = lengths.poisson(rate_rps, seconds=0.0, seed=seed)
    return made.between(0.0, 30.0)


def routed(leg: Leg, during: DeploymentPlan, after: DeploymentPlan) -> RoutedLeg:
    return RoutedLeg(leg=leg, during=during, after=after)


def one_by_one(seconds: float) -> list[RoutedLeg]:
    """Each old replica leaves before the new one on its devices starts."""
    first = Leg(leaving=OLD[:1], started=NEW[:1], seconds=seconds)
    second = Leg(leaving=OLD[1:], started=NEW[1:], seconds=seconds)
    return [
        routed(first, plan(OLD[1]), plan(OLD[1], NEW[0])),
        routed(second, plan(NEW[0]), plan(*NEW)),
    ]


def side_by_side(seconds: float) -> list[RoutedLeg]:
    """The old replicas serve until the new ones are ready, then drain."""
    leg = Leg(started=NEW, retired=OLD, seconds=seconds)
    return [routed(leg, plan(*OLD), plan(*NEW))]


def switched(
    routing: Routing,
    legs: Sequence[RoutedLeg],
    played: SimulatedTraffic,
    drain_limit_s: float = 5.0,
) -> FleetResults:
    return simulate_switches(
        SIMULATOR,
        serving(routing),
        [TimedSwitch(at_s=AT_S, legs=tuple(legs))],
        played,
        drain_limit_s=drain_limit_s,
    )


@settings(max_examples=12)
@given(
    st.sampled_from([one_by_one, side_by_side]),
    st.sampled_from([Routing.POOLS, Routing.LEAST_WORK]),
    st.floats(0.0, 20.0),
    st.floats(0.0, 8.0),
    st.floats(1.0, 8.0),
    st.integers(0, 5),
)
def test_no_request_is_lost(
    way: object, routing: Routing, seconds: float, drain_limit_s: float, rate: float, seed: int
) -> None:
    played = traffic(rate, seed)
    legs = way(seconds)  # type: ignore[operator]
    results = switched(routing, legs, played, drain_limit_s)
    assert (results.status == Status.COMPLETED).all()
    names = np.array(results.replica_names)[results.replica]
    # Before they are ready, new replicas serve no request; the old ones are gone in the end.
    new = np.isin(names, [item.id for item in NEW])
    assert (results.finish_s[new] >= AT_S + seconds).all()
    gone_s = AT_S + 2 * (seconds + drain_limit_s) + 2.0
    assert (results.finish_s[~new] <= gone_s).all()


def test_nothing_changes_without_legs_and_before_the_switch() -> None:
    played = traffic(6.0, 1)
    alone = SIMULATOR.run(serving(Routing.POOLS), played)
    none = switched(Routing.POOLS, [], played)
    assert np.array_equal(none.finish_s, alone.finish_s)
    moved = switched(Routing.POOLS, one_by_one(5.0), played)
    before = alone.finish_s < AT_S
    assert before.any()
    assert np.array_equal(moved.finish_s[before], alone.finish_s[before])


def test_slower_starts_serve_later() -> None:
    played = traffic(8.0, 2)
    slow, quick = (
        switched(Routing.LEAST_WORK, one_by_one(seconds), played) for seconds in (15.0, 0.0)
    )
    assert np.nanmean(quick.finish_s) <= np.nanmean(slow.finish_s)


@settings(max_examples=6)
@given(st.sampled_from([one_by_one, side_by_side]), st.floats(0.0, 20.0), st.floats(0.0, 30.0))
def test_after_the_way_back_the_old_replicas_serve_again(
    way: object, seconds: float, back_s: float
) -> None:
    played = traffic(4.0, 3)
    there = way(seconds)  # type: ignore[operator]
    home = routed(Leg(started=OLD, retired=NEW, seconds=seconds), plan(*NEW), plan(*OLD))
    results = simulate_switches(
        SIMULATOR,
        serving(Routing.LEAST_WORK),
        # If the way there is longer, the way back begins after it.
        [
            TimedSwitch(at_s=AT_S, legs=tuple(there)),
            TimedSwitch(at_s=AT_S + back_s, legs=(home,)),
        ],
        played,
        drain_limit_s=5.0,
    )
    assert (results.status == Status.COMPLETED).all()
    assert {item.id for item in OLD} <= set(results.replica_names)
    names = np.array(results.replica_names)[results.replica]
    last = results.arrival_s > AT_S + max(back_s, 2 * (seconds + 6.0)) + seconds + 6.0
    assert np.isin(names[last], [item.id for item in OLD]).all()
