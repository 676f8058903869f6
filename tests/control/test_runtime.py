"""A second opinion is asked before a switch, and counts."""

from dataclasses import replace

import pytest

from oserve.control.evaluation import (
    CandidateScore,
    DecisionInput,
    ForecastStep,
    SimulatedScore,
    TypeRates,
)
from oserve.control.policy import ControlPolicy
from oserve.control.runtime import ControllerRuntime, Scorer
from oserve.control.starts import StartTimes

from .toy import plan_of, planner

BEYOND = (2.0, 12.0)


def helm(scorer: Scorer | None) -> ControllerRuntime:
    return ControllerRuntime(
        plan_of(0, 0, 0, 1),
        policy=ControlPolicy(interval_s=20),
        planner=planner(),
        starts=StartTimes(20.0),
        shares_interval_s=5.0,
        scorer=scorer,
    )


def question(made: ControllerRuntime, rates: TypeRates) -> DecisionInput:
    step = ForecastStep(seconds=20.0, probabilities={rates: 1.0}, expected=rates)
    return replace(
        made.controller.decision_input(0.0), steps=(step,), plan_for=(rates,), now_rps=rates
    )


def test_what_the_second_opinion_says_counts() -> None:
    asked: list[CandidateScore] = []

    def doubts(_: DecisionInput, found: CandidateScore) -> SimulatedScore:
        asked.append(found)
        return SimulatedScore(current_rps=9.0, candidate_rps=10.0, net_gain=-3.0)

    alone, doubted = helm(None), helm(doubts)
    trusted = alone.evaluate(question(alone, BEYOND))
    found = doubted.evaluate(question(doubted, BEYOND))
    assert isinstance(trusted, CandidateScore)
    assert isinstance(found, CandidateScore)
    assert trusted.gain > 0
    # Others that come near it by the table are asked about, too.
    assert asked[0] == trusted
    assert 1 <= len({frozenset(item.plan.replicas) for item in asked}) == len(asked) <= 5
    assert found.net_gain == pytest.approx(-3.0)
    assert (found.current_rps, found.candidate_rps) == (9.0, 10.0)
    assert (found.plan, found.cost) == (trusted.plan, trusted.cost)


def test_it_is_not_asked_of_the_present_plan_nor_of_what_a_person_wants() -> None:
    def never(_: DecisionInput, found: CandidateScore) -> SimulatedScore:
        raise AssertionError(found.plan.id)

    made = helm(never)
    present = question(made, (20.0, 3.0))
    present = replace(present, current=made.planner.candidates((20.0, 3.0), present.current)[0])
    assert made.evaluate(present) is not None
    given = replace(question(made, BEYOND), given=plan_of(1, 1, 1, 1))
    assert made.evaluate(given) is not None
