"""The realised gain of a switch: what was kept, against the old plan on the same requests."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evaluate.test_switch_simulation import request_
from oserve.config import plan_yaml
from oserve.control.planner import TablePlanner
from oserve.control.planning import planner_for
from oserve.control.starts import StartTimes
from oserve.core import DeploymentPlan, FinishStatus, RequestRecord
from oserve.evaluate.realised import RealisedCase, realised
from oserve.evaluate.switch_scorer import SwitchScorer, model_of
from oserve.gateway.records import RecordStore
from oserve.perf.corrected import Speeds
from oserve.plan.planning import PlanRequest
from oserve.startup.store import StateStore, StateUpdate
from oserve.startup.switch_judge import plans_around

__all__ = ["request_"]

START_S = 1_000.0


def plans(request: PlanRequest) -> tuple[DeploymentPlan, DeploymentPlan]:
    """One replica, and all of the best plan."""
    planner = TablePlanner(planner_for(request, StartTimes(5.0)).facts)
    nothing = DeploymentPlan(
        id="none", replicas=(), length_classes=request.demand.classes, routing_shares={}
    )
    whole, *_ = planner.candidates((8.0, 0.2), nothing)
    first = whole.replicas[0]
    shares = {kind: {first.id: 1.0} for kind in whole.routing_shares}
    return replace(whole, id="half", replicas=(first,), routing_shares=shares), whole


def stored(folder: Path, rate_rps: float, **fields: Any) -> Path:
    path = folder / "records.sqlite"
    store = RecordStore(path, max_records=100_000)
    for index in range(round(rate_rps * 90.0)):
        defaults: dict[str, Any] = {
            "arrival_s": START_S - 60.0 + index / rate_rps,
            "prompt_tokens": 60,
            "output_tokens": 120,
            "workload_type": "chats",
            "replica": "r0",
            "ttft_s": 0.1,
            "tpot_s": 0.01,
            "e2e_s": 1.3,
            "status": FinishStatus.COMPLETED,
        }
        store.put(RequestRecord(**{**defaults, **fields}))
    store.close()
    return path


@pytest.mark.slow
def test_a_switch_is_worth_what_the_old_plan_could_not_have_kept(
    request_: PlanRequest, tmp_path: Path
) -> None:
    old, new = plans(request_)
    scorer = SwitchScorer(model_of(request_, min_gain=0.05))
    case = RealisedCase(
        records=stored(tmp_path, 4.0),
        old=old,
        new=new,
        start_s=START_S,
        end_s=START_S + 30.0,
        speeds=Speeds(),
        max_model_len=8192,
    )
    calm = realised(scorer, case)
    assert calm is not None
    # Requests from before the switch fill replicas and do not count.
    assert (calm.requests, calm.kept) == (120, 120)
    assert calm.by_new == 120
    assert calm.by_old <= calm.by_new
    # Many times as much: one replica cannot hold it.
    (tmp_path / "more").mkdir()
    crowd = realised(scorer, replace(case, records=stored(tmp_path / "more", 30.0)))
    assert crowd is not None
    assert crowd.kept == crowd.requests
    assert crowd.by_old < crowd.by_new
    # What nobody asked for cannot be judged.
    assert realised(scorer, replace(case, start_s=5_000.0, end_s=5_030.0)) is None


@pytest.mark.slow
def test_requests_that_were_late_or_failed_were_not_kept(
    request_: PlanRequest, tmp_path: Path
) -> None:
    old, new = plans(request_)
    scorer = SwitchScorer(model_of(request_, min_gain=0.05))
    kept = []
    late: dict[str, Any] = {"ttft_s": 3.0}
    failed: dict[str, Any] = {"status": FinishStatus.FAILED}
    for number, fields in enumerate((late, failed, {**late, "kept": True})):
        folder = tmp_path / str(number)
        folder.mkdir()
        case = RealisedCase(
            records=stored(folder, 1.0, **fields),
            old=old,
            new=new,
            start_s=START_S,
            end_s=START_S + 30.0,
            speeds=Speeds(),
            max_model_len=8192,
        )
        found = realised(scorer, case)
        assert found is not None
        kept.append(found.kept)
    assert kept == [0, 0, 30]


def test_the_plans_around_a_switch(request_: PlanRequest, tmp_path: Path) -> None:
    old, new = plans(request_)
    store = StateStore(tmp_path / "state.sqlite")
    for at_s, plan in ((10.0, old), (100.0, new), (200.0, old), (300.0, new)):
        store.save(StateUpdate(memory={}, plan=(at_s, plan_yaml(plan))))
    found = plans_around(store, new.id, 100.5)
    assert found is not None
    assert (found[0].id, found[1].id) == (old.id, new.id)
    found = plans_around(store, old.id, 200.5)
    assert found is not None
    assert (found[0].id, found[1].id) == (new.id, old.id)
    assert plans_around(store, old.id, 10.5) is None
    assert plans_around(store, "unknown", 400.0) is None
