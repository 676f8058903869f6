"""The traffic on which switches are judged: what came, what is expected, what was before."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oserve.control.evaluation import DecisionInput, ForecastStep, TypeRates
from oserve.core import DeploymentPlan
from oserve.evaluate.capacities import LengthSamples
from oserve.evaluate.workload import evaluation_workload, poisson_stages

LENGTHS = [
    LengthSamples(prompt_tokens=np.array([10, 20]), output_tokens=np.array([5, 6])),
    LengthSamples(prompt_tokens=np.array([1000]), output_tokens=np.array([1])),
]
NOW, BEFORE = (20.0, 1.0), (5.0, 4.0)


def question(**fields: object) -> DecisionInput:
    plan = DeploymentPlan(id="x", replicas=(), length_classes=(), routing_shares={})
    step = ForecastStep(seconds=60.0, probabilities={NOW: 1.0}, expected=NOW)
    given: dict[str, object] = {
        "at_s": 0.0,
        "current": plan,
        "now_rps": NOW,
        "steps": (step,),
        "lasts_s": 60.0,
        "plan_for": (NOW,),
        **fields,
    }
    return DecisionInput(**given)  # type: ignore[arg-type]


def test_it_has_three_parts_at_their_rates() -> None:
    asked = question(past=((BEFORE, 15.0), (NOW, 85.0)), before=BEFORE, back_s=120.0)
    ahead = evaluation_workload(asked, 400.0, LENGTHS, seed=1)
    assert (ahead.now_s, ahead.then_s, ahead.lasting_s) == (100.0, 500.0, 400.0)
    assert ahead.back_s == 620.0
    arrival_s = ahead.traffic.arrival_s
    assert (np.diff(arrival_s) >= 0).all()
    # The earlier traffic goes on after the way back, until what that leaves behind is served.
    later_s = 420.0
    assert arrival_s[-1] < 500.0 + later_s
    assert ahead.expected.sum() == pytest.approx(400 * sum(NOW), rel=0.05)
    assert ahead.later.sum() == pytest.approx(later_s * sum(BEFORE), rel=0.1)
    assert not (ahead.expected & ahead.later).any()
    long = ahead.traffic.prompt_tokens == 1000
    assert (long & ahead.later).sum() == pytest.approx(later_s * BEFORE[1], rel=0.2)


def test_without_history_it_begins_warm_and_never_goes_back() -> None:
    ahead = evaluation_workload(question(), 1e6, LENGTHS, seed=1)
    assert ahead.now_s > 0
    # Nobody can simulate forever.
    assert ahead.lasting_s <= 900.0
    assert not ahead.later.any()
    nothing = question(
        steps=(ForecastStep(seconds=60.0, probabilities={(0.0, 0.0): 1.0}, expected=(0.0, 0.0)),)
    )
    assert len(evaluation_workload(nothing, 100.0, LENGTHS, seed=1).traffic) == 0


def test_a_long_past_loses_whole_periods_where_it_has_too_many_requests() -> None:
    for rate_rps, kept_s in ((1.0, 1205.0), (60.0, 905.0), (1000.0, 305.0)):
        past = (((rate_rps, 0.0), 15.0),) * 80 + (((rate_rps, 0.0), 5.0),)
        ahead = evaluation_workload(question(past=past), 1.0, LENGTHS, seed=1)
        assert ahead.now_s == kept_s


@given(
    st.lists(st.tuples(st.floats(0, 30), st.floats(0, 5), st.floats(1, 40)), min_size=1),
    st.integers(0, 2**31),
)
def test_arrivals_stay_in_their_stage(parts: list[tuple[float, float, float]], seed: int) -> None:
    stages: list[tuple[TypeRates, float]] = [((a, b), seconds) for a, b, seconds in parts]
    traffic = poisson_stages(LENGTHS, stages, seed=seed)
    assert len(traffic) == 0 or traffic.arrival_s[-1] <= sum(item[1] for item in stages)
    start_s = 0.0
    for rates, seconds in stages:
        end_s = start_s + seconds
        inside = (traffic.arrival_s >= start_s) & (traffic.arrival_s < end_s)
        assert sum(rates) > 0 or not inside.any()
        start_s = end_s
    again = poisson_stages(LENGTHS, stages, seed=seed)
    assert np.array_equal(traffic.arrival_s, again.arrival_s)
