"""A second opinion is asked before a switch, and counts."""

from dataclasses import replace

from oserve.control.appraisal import Question, Rates, Step, Weighed
from oserve.control.helm import Helm, Scorer
from oserve.control.policy import ControlPolicy
from oserve.control.starts import StartTimes

from .toy import plan_of, planner

BEYOND = (2.0, 12.0)


def helm(scorer: Scorer | None) -> Helm:
    return Helm(
        plan_of(0, 0, 0, 1),
        policy=ControlPolicy(interval_s=20),
        planner=planner(),
        starts=StartTimes(20.0),
        shares_interval_s=5.0,
        scorer=scorer,
    )


def question(made: Helm, rates: Rates) -> Question:
    step = Step(seconds=20.0, chances={rates: 1.0}, expected=rates)
    return replace(made.controller.ask(0.0), steps=(step,), plan_for=(rates,), now_rps=rates)


def test_a_gain_is_no_more_than_the_second_opinion_of_it() -> None:
    asked: list[Weighed] = []

    def nothing(_: Question, found: Weighed) -> float:
        asked.append(found)
        return 0.0

    alone, doubted = helm(None), helm(nothing)
    trusted = alone.weighed(question(alone, BEYOND))
    found = doubted.weighed(question(doubted, BEYOND))
    assert trusted is not None
    assert found is not None
    assert trusted.gain > 0
    assert asked == [trusted]
    assert found == replace(trusted, gain=trusted.cost.requests)
    sure = helm(lambda _question, _found: 1e6)
    assert sure.weighed(question(sure, BEYOND)) == trusted


def test_it_is_not_asked_where_nobody_would_switch() -> None:
    def never(_: Question, found: Weighed) -> float:
        raise AssertionError(found.plan.id)

    made = helm(never)
    asked = question(made, (1.0, 0.5))
    assert made.weighed(asked) is not None
    # Nor of what a person wants.
    given = replace(question(made, BEYOND), given=plan_of(1, 1, 1, 1))
    assert made.weighed(given) is not None
