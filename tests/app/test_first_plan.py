"""The plan that serving starts with when it is given none."""

import sqlite3
from pathlib import Path

import pytest

from oserve.app.deployment import prepare
from oserve.app.first_plan import FirstPlan, first_plan, know, planning_question
from oserve.config import Settings, load_settings
from oserve.core import Device, OServeError, Precision

SLOTS = tuple(Device(id=f"cpu:{index}", kind="cpu") for index in range(2))


def settings(model: str, tmp_path: Path, **more: object) -> Settings:
    return load_settings(
        None,
        {"model": model, "state_dir": str(tmp_path / "state"), "cluster.cpu_slots": 2, **more},
        {},
    )


def planned(given: Settings) -> FirstPlan:
    return first_plan(planning_question(given, SLOTS, know(given, SLOTS), Precision.FP32))


def test_without_a_plan_one_is_computed_and_says_what_for(model: str, tmp_path: Path) -> None:
    deployment = prepare(settings(model, tmp_path, **{"cluster.devices": "cpu"}))
    assert "a plan computed for an assumed mix" in deployment.why
    assert "best homogeneous" in deployment.why
    assert "profile" in deployment.why
    assert deployment.plan.replicas
    known = deployment.costs(deployment.plan.replicas[0].shape, "cpu")
    assert 0 < known.prefill_s_per_token < known.decode_s_per_token


def test_only_precisions_that_can_be_had_are_planned(model: str, tmp_path: Path) -> None:
    plain = settings(model, tmp_path)
    found = planned(plain)
    assert {spec.shape.precision for spec in found.plan.replicas} == {Precision.FP32}
    both = settings(model, tmp_path, **{"engines.variants": {"int8": "elsewhere"}})
    found = planned(both)
    assert Precision.INT8 in {spec.shape.precision for spec in found.plan.replicas}
    only = settings(model, tmp_path, **{"planning.precisions": ["fp32"]})
    found = planned(only)
    assert {spec.shape.precision for spec in found.plan.replicas} == {Precision.FP32}


def test_the_traffic_may_be_given(model: str, tmp_path: Path) -> None:
    given = settings(model, tmp_path, **{"planning.rates": "100x50=2,2000x20=0.1"})
    found = planned(given)
    assert "planning.rates" in found.why
    names = [kind.name for kind in found.plan.workload_types]
    assert len(names) == 2
    for shares in found.plan.routing_shares.values():
        assert sum(shares.values()) == pytest.approx(1.0)


def test_enough_records_are_the_traffic(model: str, tmp_path: Path) -> None:
    file = tmp_path / "records.sqlite"
    given = settings(model, tmp_path, **{"gateway.records_file": str(file)})
    with sqlite3.connect(file) as store:
        store.execute(
            "CREATE TABLE requests (arrival_s REAL, prompt_tokens INTEGER, output_tokens INTEGER,"
            " workload_type TEXT, replica TEXT, ttft_s REAL, tpot_s REAL, e2e_s REAL, status TEXT)"
        )
        rows = [
            (float(second), 40, 30, "all", "r0", 0.1, 0.01, 0.4, "completed")
            for second in range(400)
        ]
        store.executemany("INSERT INTO requests VALUES (?,?,?,?,?,?,?,?,?)", rows)
        store.commit()
        few = planned(given)
        assert "assumed" in few.why
        store.executemany("INSERT INTO requests VALUES (?,?,?,?,?,?,?,?,?)", rows)
        store.commit()
    many = planned(given)
    assert "800 recorded requests" in many.why


def test_a_model_nothing_is_known_of_gets_the_default_and_the_reason(tmp_path: Path) -> None:
    unknown = settings("someone/unheard-of", tmp_path, **{"cluster.devices": "cpu"})
    deployment = prepare(unknown)
    assert "none can be computed" in deployment.why
    assert "unheard-of" in deployment.why
    assert len(deployment.plan.replicas) == 2


def test_a_bad_profile_that_was_asked_for_is_an_error(model: str, tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    file.write_text('{"format": 1, "model": 7}')
    given = settings(model, tmp_path, **{"planning.profile": str(file)})
    with pytest.raises(OServeError) as caught:
        know(given, SLOTS)
    assert "profile.json" in caught.value.place
