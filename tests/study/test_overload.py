"""Defences against overload, beliefs about answers, and roles apart, in small scenes."""

from dataclasses import replace

import numpy as np
import pytest

from oserve.control.dispatch.overload import OverloadPolicy
from oserve.core import Role
from oserve.evaluate.attainment import met
from oserve.evaluate.simulator import (
    Levers,
    Routing,
    SimulatedTraffic,
)
from oserve.sim.types import Status
from oserve.study.beliefs import (
    CLASS_MEAN,
    ESTIMATED,
    KNOWN,
    UNKNOWN,
    Beliefs,
    estimated_outputs,
    recovered,
)
from oserve.study.overload import PLAIN, defences, loaded, steady_scale
from oserve.study.roles import split
from oserve.study.scene import Scene
from oserve.study.tune import JSQ, MeasuredServing, Tuner
from study.scenes import small_scene


@pytest.fixture(scope="module")
def scene() -> Scene:
    return small_scene()


@pytest.fixture(scope="module")
def plain(scene: Scene) -> MeasuredServing:
    tuner = Tuner(scene)
    return tuner.measure(tuner.homogeneous(tuner.forms([512])[-1], JSQ))


def test_demotion_keeps_goodput_where_first_come_loses_it(
    scene: Scene, plain: MeasuredServing
) -> None:
    tuner = Tuner(scene)
    serving = plain.serving
    scale = 1.5 * steady_scale(tuner, serving)
    rows = {
        name: loaded(tuner, serving, levers, scale)
        for name, levers in defences(tuner, serving).items()
    }
    assert rows["demotion"].goodput_rps > 1.2 * rows[PLAIN].goodput_rps
    both = rows["demotion and shedding"]
    assert both.goodput_rps > 1.2 * rows[PLAIN].goodput_rps
    assert both.shed > 0.0 == rows["demotion"].shed == rows[PLAIN].shed
    assert both.p99_ttft_s < rows["demotion"].p99_ttft_s
    assert all(0.0 <= share <= 1.0 for row in rows.values() for share in row.met_by_class)


def test_within_capacity_demotion_costs_nothing(scene: Scene, plain: MeasuredServing) -> None:
    tuner = Tuner(scene)
    levers = replace(plain.serving.levers, overload=OverloadPolicy(ttft_s=scene.slo.ttft_s))
    demoting = tuner.measure(replace(plain.serving, levers=levers), start=plain.scale)
    assert demoting.scale > 0.9 * plain.scale


def test_prompts_move_from_prefill_replicas_to_decode_replicas(scene: Scene) -> None:
    tuner = Tuner(scene)
    servings = list(split(tuner, JSQ))
    assert servings
    for serving in servings:
        roles = {spec.shape.role for spec in serving.plan.replicas}
        assert roles == {Role.PREFILL, Role.DECODE}
    spec = servings[0].plan.replicas
    results = tuner.simulator.run(servings[0], scene.traffic)
    assert (results.status == Status.COMPLETED).all()
    ended = np.array([spec[index].shape.role is Role.DECODE for index in results.replica])
    assert ended[results.output_tokens > 1].all()
    prompts = [t.prompt_tokens for t, s in zip(results.totals, spec, strict=True)]
    assert sum(prompts[i] for i, s in enumerate(spec) if s.shape.role is Role.PREFILL) >= (
        0.99 * scene.traffic.prompt_tokens.sum()
    )
    assert met(results, scene.slo).any()


def test_the_estimator_is_told_nothing_of_what_has_not_ended() -> None:
    count = 200
    rng = np.random.default_rng(1)
    outputs = rng.integers(1, 2000, count)
    traffic = SimulatedTraffic(
        arrival_s=np.arange(count, dtype=np.float64),
        prompt_tokens=rng.integers(1, 3000, count),
        output_tokens=outputs,
    )
    finish_s = traffic.arrival_s + rng.uniform(0.5, 50.0, count)
    finish_s[::7] = np.nan
    tenants = ["a" if output > 1000 else "b" for output in outputs]
    told = estimated_outputs(traffic, finish_s, tenants=tenants)
    for moment in (0, 50, 120):
        unseen = ~(finish_s <= traffic.arrival_s[moment])
        changed = replace(traffic, output_tokens=np.where(unseen, 7, outputs))
        other = estimated_outputs(changed, finish_s, tenants=tenants)
        assert (other[: moment + 1] == told[: moment + 1]).all()
    # Who sends is told apart, once seen.
    late = np.arange(count) > 120
    long = np.array(tenants) == "a"
    assert told[late & long].mean() > 1.5 * told[late & ~long].mean()


def test_beliefs_about_answers() -> None:
    scene = replace(small_scene(duration_s=60.0), learn_s=20.0)
    tuner = Tuner(scene)
    small = tuner.forms([512])[-1]
    levers = Levers(routing=Routing.LEAST_WORK)
    count = len(scene.traffic)
    alike = tuner.deployed([(small, 4 // small.device_count)], levers)
    told = Beliefs(tuner, alike, [""] * count)
    after = scene.traffic.between(20.0, float("inf"))
    assert (told.expected(KNOWN, 1.0) == after.output_tokens).all()
    assert len(set(told.expected(UNKNOWN, 1.0).tolist())) == 1
    assert len(set(told.expected(CLASS_MEAN, 1.0).tolist())) <= len(scene.demand.classes)
    assert told.expected(ESTIMATED, 1.0).min() >= 1
    row = told.measure(ESTIMATED, capacity=1.0)
    assert row.capacity_scale > 0.0
    assert 0.0 < row.p95_e2e_s <= row.p99_e2e_s
    assert row.imbalance >= 0.0


def test_long_answers_have_the_larger_replicas() -> None:
    scene = replace(small_scene(cluster="8xH100", duration_s=60.0), learn_s=20.0)
    tuner = Tuner(scene)
    forms = {shape.device_count: shape for shape in tuner.forms([512])}
    serving = tuner.deployed([(forms[2], 2), (forms[4], 1)], Levers(routing=Routing.LEAST_WORK))
    count = len(scene.traffic)
    apart = Beliefs(tuner, serving, [""] * count, pools=True)
    together = Beliefs(tuner, serving, [""] * count)
    assert apart.capacity(KNOWN) > 0.0
    # Where all answers are believed to be alike there is one pool, and nothing changes.
    assert apart.capacity(UNKNOWN) == together.capacity(UNKNOWN)


def test_the_share_of_a_gap() -> None:
    assert recovered(10.0, 6.0, 5.0) == "80%"
    assert recovered(10.0, 11.0, 5.0) == "-20%"
    assert recovered(10.0, 9.0, 9.9) == "no gap"
    assert recovered(10.0, 9.0, 12.0) == "knowing is worse"
