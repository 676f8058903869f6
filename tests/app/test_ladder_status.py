"""``oserve status`` shows the ladder of a server, the place on it, and why."""

import io
from typing import Any

import pytest
from rich.console import Console

from oserve.cli.ladder_status import WHY, merged, show_ladder
from oserve.control.decision import Reason
from oserve.control.ladder import Goal, Ladder, LadderDeployment, LoadScore
from oserve.control.ladder_table import ladder_document
from oserve.core import Objective, ReplicaShape


def rung(load: float, deployment: str, *, holds: bool = True) -> dict[str, Any]:
    return {
        "load": load,
        "rate_rps": 20 * load,
        "deployment": deployment,
        "devices": 4,
        "holds": holds,
        "p50_e2e_s": 1 + load,
        "p99_e2e_s": 2 + load,
        "joules_per_request": 100.0,
    }


def control(reason: str, place: dict[str, Any] | None, **changed: Any) -> dict[str, Any]:
    rungs = [
        rung(0.1, "1 x tp4-bf16-512"),
        rung(0.5, "1 x tp4-bf16-512"),
        rung(1.0, "4 x tp1-bf16-512"),
        rung(1.3, "4 x tp1-bf16-512", holds=False),
    ]
    return {
        "ladder": {
            "objectives": {"chat": "latency", "docs": "latency"},
            "headroom": 1.1,
            "reference_rps": 20.0,
            "load": 0.3,
            "deployment": "1 x tp4-bf16-512",
            "rungs": rungs,
            **changed,
        },
        "decisions": [{"verdict": "keep", "reason": reason, "place": place}],
    }


def shown(document: dict[str, Any]) -> str:
    screen = io.StringIO()
    show_ladder(Console(file=screen, width=160), document)
    return screen.getvalue()


PLACE = {"expected_load": 0.45, "required_load": 0.9, "rung": "4 x tp1-bf16-512"}


def test_the_place_is_marked_and_the_reason_is_a_sentence() -> None:
    said = shown(control("minimum_dwell", PLACE))
    rows = [line for line in said.splitlines() if " %" in line and "│" in line]
    assert len(rows) == 3
    assert "10 to 50 %" in rows[0]
    assert "2.00 to 10.00" in rows[0]
    assert "serving, now, expected" in rows[0]
    assert "required" in rows[1]
    assert "does not hold" in rows[2]
    assert "load now 30%" in said
    assert "required 90%" in said
    assert "keep, the last switch was a short while ago" in said
    assert "the rung is 4 x tp1-bf16-512" in said


def test_a_server_without_a_ladder_or_a_decision_shows_what_there_is() -> None:
    assert shown({"ladder": None, "decisions": []}) == ""
    assert shown({"decisions": []}) == ""
    said = shown(control("no_data", None) | {"decisions": []})
    assert "serving, now" in said
    assert "last decision" not in said
    mixed = control("no_data", None, objectives={"chat": "latency", "docs": "energy"})
    assert "latency of chat, energy of docs" in shown(mixed)


@pytest.mark.parametrize("load", [5.0, 1.3, 0.0])
def test_every_load_has_a_rung(load: float) -> None:
    assert "now" in shown(control("same_plan", None, load=load))


def test_the_ladder_of_a_controller_is_shown() -> None:
    """Its rungs are the objective's choice: the fast deployment as far as it holds."""

    def scores(fast_s: float, limit: float) -> tuple[LoadScore, ...]:
        return tuple(
            LoadScore(
                load=load,
                attainment=1.0 if load <= limit else 0.4,
                type_attainment=(1.0 if load <= limit else 0.4,),
                type_e2e_s=(fast_s,),
                p50_e2e_s=fast_s,
                p99_e2e_s=2 * fast_s,
                p50_ttft_s=0.1,
                p99_ttft_s=0.2,
                joules=50.0,
            )
            for load in (0.2, 0.4, 0.6, 0.8, 1.0)
        )

    large = ReplicaShape(tensor_parallel_size=4, max_num_batched_tokens=512)
    small = ReplicaShape(tensor_parallel_size=1, max_num_batched_tokens=512)
    ladder = Ladder(
        names=("chat",),
        rates=(10.0,),
        work=(1.0,),
        loads=(0.2, 0.4, 0.6, 0.8, 1.0),
        deployments=(
            LadderDeployment(shapes=((large, 1),), scores=scores(1.0, 0.6)),
            LadderDeployment(shapes=((small, 4),), scores=scores(2.0, 1.0)),
        ),
    )
    goal = Goal(objectives=(Objective.LATENCY,))
    document = ladder_document(ladder, goal, headroom=1.1)
    said = shown({"ladder": document | {"load": 0.1}, "decisions": []})
    rows = [line for line in said.splitlines() if " %" in line and "│" in line]
    assert [large.name in row for row in rows[:2]] == [True, False]
    assert "20 to 40 %" in rows[0]
    assert "60 to 80 %" in rows[1]
    assert "does not hold" in rows[2]
    assert "load now 10% of 10.00 requests/s" in said


def test_merged_rungs_are_all_rungs_in_order() -> None:
    rungs = control("same_plan", None)["ladder"]["rungs"]
    assert [item for group in merged(rungs) for item in group] == rungs


def test_reasons_that_a_ladder_gives_have_words() -> None:
    linear = {
        *(Reason.NO_PLAN, Reason.BELOW_PRESENT_NEED, Reason.COST_EXCEEDS_GAIN),
        Reason.GAIN_EXCEEDS_COST,
    }
    assert set(WHY) == set(Reason) - linear
