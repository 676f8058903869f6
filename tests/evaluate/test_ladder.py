"""Ladders by simulation: their scores are those of the simulator, and no deployment is lost."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oserve.config import load_cluster
from oserve.control.ladder import Goal, Ladder, Shapes, counted, device_count
from oserve.core import (
    DeploymentPlan,
    Device,
    LengthClass,
    Objective,
    OServeError,
    ReplicaShape,
)
from oserve.evaluate.attainment import met
from oserve.evaluate.capacities import LengthSamples
from oserve.evaluate.ladder import LadderBuilder, LadderCase
from oserve.evaluate.ladder_traffic import LadderTraffic, drawn_traffic
from oserve.evaluate.simulator import (
    Levers,
    SimulatedServing,
    Simulator,
)
from oserve.perf.known_models import find_model
from oserve.perf.source import RooflineSource
from oserve.plan.mixtures import homogeneous
from oserve.plan.place import place_replicas
from oserve.sim.types import Status
from oserve.traces import Slo

SIMULATOR = Simulator(RooflineSource(find_model("qwen3-8b")))
CLASSES = (LengthClass(name="all", output_tokens=20),)
SLO = Slo(ttft_s=1.0, tpot_s=0.05)
LOADS = (0.2, 1.0)


def lengths(prompt: int, output: int, count: int = 1) -> LengthSamples:
    return LengthSamples(
        prompt_tokens=np.full(count, prompt, dtype=np.int64),
        output_tokens=np.full(count, output, dtype=np.int64),
    )


SHORT, LONG = lengths(100, 20), lengths(1500, 10)


def shape(tensor: int, kind: str = "H100", chunk: int = 512) -> ReplicaShape:
    return ReplicaShape(
        tensor_parallel_size=tensor,
        max_num_batched_tokens=chunk,
        max_num_seqs=64,
        device_kind=kind,
    )


def few_requests(rates: tuple[float, ...], count: int = 200) -> LadderTraffic:
    """The first requests of drawn ones."""
    drawn = drawn_traffic((SHORT, LONG), rates, burstiness=(0.0, 0.0), seed=1)
    cut = drawn.requests.between(0.0, float(drawn.requests.arrival_s[count]))
    return LadderTraffic(requests=cut, kinds=drawn.kinds[: len(cut)], rates=rates)


def case_of(
    *shapes: ReplicaShape,
    cluster: str = "2xH100",
    objective: Objective = Objective.LATENCY,
    rates: tuple[float, ...] = (40.0, 4.0),
    **options: object,
) -> LadderCase:
    case = LadderCase(
        names=("short", "long"),
        rates=rates,
        lengths=(SHORT, LONG),
        work=(1.0, 5.0),
        devices=load_cluster(cluster).devices,
        classes=CLASSES,
        shapes=shapes,
        levers=Levers(),
        slo=SLO,
        goal=Goal(objectives=(objective,) * 2),
        traffic=few_requests(rates),
        loads=LOADS,
    )
    return replace(case, **options)  # type: ignore[arg-type]


def built(case: LadderCase) -> Ladder:
    return LadderBuilder(SIMULATOR, case).build()


def test_scores_are_those_of_the_simulator() -> None:
    case = case_of(shape(1), shape(2))
    ladder = built(case)
    assert case.traffic is not None
    assert {item.shapes for item in ladder.deployments} == {((shape(1), 2),), ((shape(2), 1),)}
    for item in ladder.deployments:
        for own in item.scores:
            requests, kinds = case.traffic.at(own.load)
            plan = DeploymentPlan(
                id="x",
                replicas=place_replicas(item.shapes, case.devices).replicas,
                length_classes=CLASSES,
                routing_shares={},
            )
            serving = SimulatedServing(plan=plan, levers=case.levers)
            results = SIMULATOR.run(serving, requests, latest_s=120.0)
            counts = np.arange(len(requests)) >= 0.1 * len(requests)
            done = counts & (results.status == Status.COMPLETED)
            e2e_s = results.finish_s - results.arrival_s
            assert own.attainment == pytest.approx(met(results, SLO)[counts].mean())
            assert own.p99_e2e_s == pytest.approx(np.quantile(e2e_s[done], 0.99))
            assert own.type_e2e_s[0] == pytest.approx(e2e_s[done & (kinds == 0)].mean())
            assert own.joules > 0
    # Half the requests in twice the time: an idle cluster costs more for each.
    for item in ladder.deployments:
        assert item.scores[0].joules > item.scores[-1].joules


def test_the_same_case_gives_the_same_ladder() -> None:
    case = case_of(shape(1), shape(2))
    done: list[int] = []
    assert LadderBuilder(SIMULATOR, case, done.append).build() == built(case)
    assert done == list(range(1, len(done) + 1))


def test_the_present_deployment_is_always_there() -> None:
    present = ((shape(1), 1),)
    ladder = built(case_of(shape(1), shape(2), present=(present,)))
    assert ladder.find(present) is not None
    assert len({item.shapes for item in ladder.deployments}) == len(ladder.deployments)


def test_a_present_deployment_that_cannot_be_simulated_is_left_out() -> None:
    unknown: tuple[Shapes, ...] = (
        (),
        ((shape(1, kind="L40S"), 1),),
        ((shape(4), 1),),
        ((shape(1, kind="unheard-of"), 1),),
    )
    ladder = built(case_of(shape(1), present=unknown))
    assert [item.shapes for item in ladder.deployments] == [((shape(1), 2),)]


def test_a_shape_without_a_kind_is_on_the_only_one() -> None:
    nowhere = ((shape(1, kind="any"), 2),)
    ladder = built(case_of(shape(1), present=(nowhere,)))
    one, other = ladder.deployments
    assert other.shapes == nowhere
    assert one.scores == other.scores


def test_without_an_slo_requests_have_a_multiple_of_their_best_latency() -> None:
    ladder = built(case_of(shape(1), shape(2), slo=Slo()))
    assert all(item.scores[0].attainment > 0.99 for item in ladder.deployments)
    # Far beyond capacity they are late.
    crowded = built(case_of(shape(1), slo=Slo(), loads=(0.2, 60.0)))
    assert crowded.deployments[0].scores[-1].attainment < 0.6


def test_no_shape_is_an_error() -> None:
    for shapes in ((), (shape(4),), (shape(1, kind="L40S"),)):
        with pytest.raises(OServeError, match="no replica shape fits"):
            built(case_of(*shapes))


def test_several_kinds_of_devices_serve_together() -> None:
    case = case_of(shape(1), shape(2), shape(1, kind="L40S"), cluster="2xH100+2xL40S")
    ladder = built(case)
    devices = {device_count(item.shapes) for item in ladder.deployments}
    assert max(devices) == 4
    kinds = {frozenset(s.device_kind for s, _ in item.shapes) for item in ladder.deployments}
    assert frozenset({"H100", "L40S"}) in kinds


@pytest.mark.parametrize("shapes", [(shape(1), shape(1, chunk=256)), (shape(1), shape(2))])
def test_several_shapes_may_be_required(shapes: tuple[ReplicaShape, ...]) -> None:
    case = case_of(*shapes, cluster="4xH100", min_shapes=2)
    for item in built(case).deployments:
        assert len({each.name for each, _ in item.shapes}) == 2
    # Where that is impossible, there is a ladder all the same.
    assert built(replace(case, shapes=shapes[:1])).deployments


def test_energy_may_use_fewer_replicas() -> None:
    ladder = built(case_of(shape(1), cluster="4xH100", objective=Objective.ENERGY))
    goal = Goal(objectives=(Objective.ENERGY,) * 2)
    low, high = (
        ladder.deployments[ladder.choose(goal, required=load, expected=load).index]
        for load in LOADS
    )
    assert device_count(low.shapes) == 1
    assert low.scores[0].joules < max(item.scores[0].joules for item in ladder.deployments)
    assert device_count(high.shapes) >= device_count(low.shapes)


# -- the reference load --------------------------------------------------------------------------
def scaled(attained: dict[float, float], case: LadderCase) -> LadderBuilder:
    """A builder whose deployments attain what a table says, by load."""
    from oserve.control.ladder import LoadScore  # noqa: PLC0415

    class Told(LadderBuilder):
        def _simulated(self, shapes: Shapes, load: float) -> LoadScore:
            del shapes
            share = float(np.interp(load, list(attained), list(attained.values())))
            return LoadScore(
                load=load,
                attainment=share,
                type_attainment=(share, share),
                type_e2e_s=(1.0, 1.0),
                p50_e2e_s=1.0,
                p99_e2e_s=1.0,
                p50_ttft_s=1.0,
                p99_ttft_s=1.0,
                joules=1.0,
            )

    return Told(SIMULATOR, case)


@given(st.floats(0.05, 200.0))
def test_load_one_is_what_a_deployment_holds(capacity: float) -> None:
    case = case_of(shape(1), shape(2), traffic=None)
    attained = {0.0: 1.0, capacity: 0.95, 2 * capacity: 0.0}
    ladder = scaled(attained, case).build()
    found = ladder.rates[0] / case.rates[0]
    assert found == pytest.approx(capacity, rel=0.2)
    assert found <= capacity * 1.001


def test_an_slo_that_cannot_be_held_ends_the_search_early() -> None:
    done: list[int] = []
    case = case_of(shape(1), shape(2), traffic=None)
    builder = scaled({0.0: 0.1}, case)
    builder._progress = done.append
    ladder = builder.build()
    assert ladder.rates == pytest.approx(case.rates)
    assert len(done) < 60
    goal = case.goal
    assert not ladder.choose(goal, required=0.5, expected=0.5).holds


# -- the requests --------------------------------------------------------------------------------
@given(
    rates=st.lists(st.just(0.0) | st.floats(1e-3, 50.0), min_size=1, max_size=3),
    bursty=st.sampled_from((0.0, 0.3, 2.0)),
    seed=st.integers(0, 100),
)
def test_requests_are_drawn_at_their_rates(rates: list[float], bursty: float, seed: int) -> None:
    samples = [lengths(10 * (kind + 1), kind + 1) for kind in range(len(rates))]
    burstiness = (bursty,) * len(rates)

    def draw() -> LadderTraffic:
        return drawn_traffic(samples, tuple(rates), burstiness=burstiness, seed=seed)

    if sum(rates) <= 0:
        with pytest.raises(OServeError, match="a rate and lengths"):
            draw()
        return
    found = draw()
    again = draw()
    assert np.array_equal(found.requests.arrival_s, again.requests.arrival_s)
    assert np.array_equal(found.kinds, again.kinds)
    assert found.rates == tuple(rates)
    count = len(found.requests)
    assert 2000 - len(rates) <= count <= 12_000 + len(rates)
    assert (np.diff(found.requests.arrival_s) >= 0).all()
    assert (found.requests.prompt_tokens == 10 * (found.kinds + 1)).all()
    seconds = min(12_000, max(2000, 300 * sum(rates))) / sum(rates)
    assert found.requests.arrival_s[-1] <= seconds * (1 + 1e-9)
    for kind, rate in enumerate(rates):
        assert abs((found.kinds == kind).sum() - rate * seconds) <= 1


def test_bursts_are_bursts() -> None:
    def variance(bursty: float) -> float:
        found = drawn_traffic([SHORT], (20.0,), burstiness=(bursty,), seed=3)
        pieces = np.histogram(found.requests.arrival_s, bins=15, range=(0.0, 300.0))[0]
        return float(pieces.var() / pieces.mean() ** 2)

    assert variance(0.0) < 0.01
    assert 0.05 < variance(0.3) < 1.0


def test_a_type_without_lengths_has_no_requests() -> None:
    none = lengths(1, 1, count=0)
    found = drawn_traffic([SHORT, none], (5.0, 5.0), burstiness=(0.0, 0.0), seed=0)
    assert set(found.kinds.tolist()) == {0}
    assert len(found.requests) == 2000
    assert found.rates == (5.0, 5.0)
    with pytest.raises(OServeError, match="a rate and lengths"):
        drawn_traffic([none], (5.0,), burstiness=(0.0,), seed=0)


@given(st.floats(0.01, 3.0))
def test_a_load_is_a_multiple_of_the_rates(load: float) -> None:
    whole = drawn_traffic([SHORT], (30.0,), burstiness=(0.0,), seed=0)
    found, kinds = whole.at(load)
    assert len(found) == len(kinds) == round(max(2000, min(1.0, load) * len(whole.requests)))
    assert math.isclose(found.arrival_s[1999], whole.requests.arrival_s[1999] / load, rel_tol=1e-9)


def test_devices_of_a_cluster_are_used_up() -> None:
    devices: tuple[Device, ...] = load_cluster("4xH100").devices
    for counts in homogeneous(devices, [shape(1), shape(2)]):
        assert device_count(counted(counts)) == 4
