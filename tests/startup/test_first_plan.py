"""The plan that serving starts with when it is given none."""

import sqlite3
from pathlib import Path

import msgspec
import pytest

from oserve.config import Settings, load_settings
from oserve.core import Device, OServeError, Precision
from oserve.engines.processor import find_processor, plain_precisions
from oserve.perf.known_models import find_model
from oserve.perf.profile import Profile, shipped_profile, write_profile
from oserve.startup.deployment import prepare
from oserve.startup.first_plan import (
    FirstPlan,
    StepTimes,
    find_step_times,
    first_plan,
    plan_request_for,
)

SLOTS = tuple(Device(id=f"cpu:{index}", kind="cpu") for index in range(2))


def settings(model: str, tmp_path: Path, **more: object) -> Settings:
    return load_settings(
        None,
        {
            "model": model,
            "state_dir": str(tmp_path / "state"),
            "cluster.devices": "cpu",
            "cluster.cpu_slots": 2,
            "cluster.cpu_flags": "avx2",
            **more,
        },
        {},
    )


def planned(given: Settings) -> FirstPlan:
    plain = plain_precisions(SLOTS, find_processor(given.cluster.cpu_flags))
    times = find_step_times(given, SLOTS)
    assert isinstance(times, StepTimes)
    return first_plan(plan_request_for(given, SLOTS, times, plain))


def profile_of(model: str, *precisions: Precision) -> Profile:
    """As if measured here: the shipped one's fp32 entries under other names."""
    shipped = shipped_profile(find_model(model), "cpu")
    assert shipped is not None
    plain = [item for item in shipped[1].entries if item.precision is Precision.FP32]
    entries = [
        msgspec.structs.replace(item, precision=precision)
        for precision in precisions
        for item in plain
    ]
    return msgspec.structs.replace(shipped[1], entries=tuple(entries))


def test_what_was_not_measured_is_not_planned_but_told(
    model: str, tmp_path: Path, cpu_flags: str
) -> None:
    """The shipped profile knows fp32 and int8, whatever the processor is fastest in."""
    deployment = prepare(settings(model, tmp_path, **{"cluster.cpu_flags": cpu_flags}))
    used = {spec.shape.precision for spec in deployment.plan.replicas}
    assert used == {Precision.FP32}
    told = [note for note in deployment.notes if "was not measured" in note]
    assert len(told) == ("bf16" in cpu_flags)
    for note in told:
        assert "bf16" in note
        assert "planned with fp32" in note


def test_the_fastest_measured_plain_precision_is_planned(
    model: str, tmp_path: Path, cpu_flags: str
) -> None:
    fast = Precision.BF16 if "bf16" in cpu_flags else Precision.FP32
    given = settings(model, tmp_path, **{"cluster.cpu_flags": cpu_flags})
    file = Path(given.state_dir) / "profile.json"
    write_profile(file, profile_of(model, Precision.FP32, Precision.BF16))
    deployment = prepare(given)
    assert {spec.shape.precision for spec in deployment.plan.replicas} == {fast}
    assert not [note for note in deployment.notes if "was not measured" in note]


def test_variants_alone_may_have_been_measured(model: str, tmp_path: Path, cpu_flags: str) -> None:
    given = settings(
        model,
        tmp_path,
        **{"cluster.cpu_flags": cpu_flags, "engines.variants": {"int8": "elsewhere"}},
    )
    write_profile(Path(given.state_dir) / "profile.json", profile_of(model, Precision.INT8))
    deployment = prepare(given)
    assert {spec.shape.precision for spec in deployment.plan.replicas} == {Precision.INT8}
    assert any("was not measured" in note for note in deployment.notes)


def test_a_default_plan_takes_what_the_processor_is_fastest_in(
    tmp_path: Path, cpu_flags: str
) -> None:
    unknown = settings("someone/unheard-of", tmp_path, **{"cluster.cpu_flags": cpu_flags})
    fast = Precision.BF16 if "bf16" in cpu_flags else Precision.FP32
    assert {spec.shape.precision for spec in prepare(unknown).plan.replicas} == {fast}


def test_without_a_plan_one_is_computed_and_says_what_for(model: str, tmp_path: Path) -> None:
    deployment = prepare(settings(model, tmp_path))
    assert "a plan computed for an assumed mix" in deployment.why
    assert "best homogeneous" in deployment.why
    assert "profile" in deployment.why
    assert deployment.plan.replicas
    known = deployment.costs(deployment.plan.replicas[0].shape, "cpu")
    assert 0 < known.prefill_s_per_token < known.decode_s_per_token


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "objective latency: this plan serves first; the controller follows the load"),
        ({"control.mode": "advise"}, "the controller advises by load"),
        ({"planning.objective": "capacity"}, "planned for capacity alone"),
        ({"control.simulate": False}, "without control.simulate"),
        (
            {
                "planning.rates": "chat:100x50=2,docs:2000x20=0.1",
                "planning.type_objectives": {"chat": "energy"},
            },
            "objective latency (chat: energy)",
        ),
        ({"control.mode": "off"}, ""),
    ],
)
def test_a_server_says_its_objective(
    given: dict[str, object], said: str, model: str, tmp_path: Path
) -> None:
    notes = [
        note for note in prepare(settings(model, tmp_path, **given)).notes if "objective" in note
    ]
    assert len(notes) == bool(said)
    assert all(said in note for note in notes)


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


def test_several_shapes_are_planned_where_they_are_required(model: str, tmp_path: Path) -> None:
    """Whatever they are worth, which is said."""
    variants = {"engines.variants": {"int8": "elsewhere"}, "cluster.cpu_flags": "avx2 fma avx512f"}
    plain = planned(settings(model, tmp_path, **variants))
    assert "planning.min_shapes" not in plain.why
    found = planned(settings(model, tmp_path, **variants, **{"planning.min_shapes": 2}))
    assert len({spec.shape.name for spec in found.plan.replicas}) == 2
    assert "2 different shapes are required (planning.min_shapes)" in found.why
    # Two slots hold no three replicas.
    three = planned(settings(model, tmp_path, **variants, **{"planning.min_shapes": 3}))
    assert "3 different shapes (planning.min_shapes) do not fit these devices" in three.why
    assert [spec.shape for spec in three.plan.replicas] == [
        spec.shape for spec in plain.plan.replicas
    ]


def test_the_traffic_may_be_given(model: str, tmp_path: Path) -> None:
    given = settings(model, tmp_path, **{"planning.rates": "100x50=2,2000x20=0.1"})
    found = planned(given)
    assert "planning.rates" in found.why
    names = [kind.name for kind in found.plan.length_classes]
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
    unknown = settings("someone/unheard-of", tmp_path)
    deployment = prepare(unknown)
    assert "none can be computed" in deployment.why
    assert "unheard-of" in deployment.why
    assert len(deployment.plan.replicas) == 2


def test_a_bad_profile_that_was_asked_for_is_an_error(model: str, tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    file.write_text('{"format": 1, "model": 7}')
    given = settings(model, tmp_path, **{"planning.profile": str(file)})
    with pytest.raises(OServeError) as caught:
        find_step_times(given, SLOTS)
    assert "profile.json" in caught.value.place


def test_an_objective_is_for_types_that_exist(model: str, tmp_path: Path) -> None:
    rates = {"planning.rates": "chats:60x120=6,documents:1500x20=0.2"}
    objectives = {"chats": "energy"}
    prepare(settings(model, tmp_path, **rates, **{"planning.type_objectives": objectives}))
    with pytest.raises(OServeError, match=r"'chat'.*chats, documents") as found:
        prepare(
            settings(model, tmp_path, **rates, **{"planning.type_objectives": {"chat": "energy"}})
        )
    assert found.value.place == "planning.type_objectives"
