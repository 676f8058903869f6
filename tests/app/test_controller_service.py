"""The controller on a server: fed, asked, remembered, replayed."""

import fcntl
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from oserve.app.controller import ControllerService
from oserve.cli import app
from oserve.config import load_settings, parse_plan, plan_yaml
from oserve.control.decision import DecisionVerdict, Mode, Trigger
from oserve.control.tally import Batch
from oserve.core import (
    DeploymentPlan,
    Endpoint,
    Observation,
    OServeError,
    ReplicaPhase,
    ReplicaState,
    VllmBackend,
)
from oserve.plan import check_plan
from oserve.startup.deployment import ServerDeployment, prepare
from oserve.startup.plan_check import allowed_plan
from oserve.startup.switch_facts import switch_facts
from oserve.switching.prices import SwitchPrices

START_S = 1_000_000
CHATS, DOCUMENTS = (40.0, 0.2), (0.2, 12.0)
# Where decisions are beside the point, the quick ones will do.
UNSIMULATED = {"control.simulate": False}


# Ladders are prepared by the decision loop, which is not part of these tests.
CAPACITY = {"planning.objective": "capacity"}


def deployment(model: str, folder: Path, **more: object) -> ServerDeployment:
    given: dict[str, object] = {
        "model": model,
        "state_dir": str(folder / "state"),
        "cluster.devices": "cpu",
        "cluster.cpu_slots": 4,
        "cluster.cpu_flags": "avx2",
        "planning.rates": "chats:60x120=6,documents:1500x20=0.2",
        "planning.slo_ttft_ms": 2000,
        "planning.slo_tpot_ms": 100,
        "control.decision_interval_s": 20,
        "control.start_s": 5,
        **more,
    }
    return prepare(load_settings(None, given, {}))


def observed(
    plan: DeploymentPlan, given: ServerDeployment, phase: ReplicaPhase = ReplicaPhase.READY
) -> Observation:
    return Observation(
        now_s=0.0,
        devices=given.devices,
        replicas=tuple(
            ReplicaState(spec=spec, phase=phase, endpoint=Endpoint(url="x"), since_s=0.0)
            for spec in plan.replicas
        ),
    )


def service(given: ServerDeployment, **more: Any) -> ControllerService:
    assert given.plan_request is not None
    return ControllerService(given, given.plan_request, **more)


async def fed(
    steering: ControllerService,
    given: ServerDeployment,
    counts: Sequence[float],
    first: int,
    last: int,
) -> list[DecisionVerdict]:
    """Seconds of traffic; decisions are taken as they are due."""
    verdicts = []
    for second in range(first, last):
        seen = observed(steering.controller.plan, given)
        batch = Batch(names=steering.controller.names, arrivals={second: list(counts)})
        trigger = steering.observe(second + 0.999, [batch], seen)
        if trigger is not None:
            decision, _ = await steering.decide(second + 0.999, trigger)
            verdicts.append(decision.verdict)
    return verdicts


@pytest.mark.slow
async def test_it_decides_remembers_and_replays(model: str, tmp_path: Path) -> None:
    given = deployment(model, tmp_path, **CAPACITY)
    assert given.mode is Mode.AUTO
    facts = switch_facts(given.settings, given.devices, available_bytes=lambda: sys.maxsize)
    steering = service(given, now_s=START_S, legs=SwitchPrices(facts).legs)
    await fed(steering, given, CHATS, START_S, START_S + 130)
    await fed(steering, given, DOCUMENTS, START_S + 130, START_S + 400)
    decisions = list(steering.controller.decisions)
    assert decisions
    assert decisions[-1].forecast[1].expected_rps == pytest.approx(12.0, rel=0.3)
    check_plan(steering.controller.plan, given.devices)
    document = steering.document()
    assert document["decisions"][-1]["line"]

    text = plan_yaml(steering.controller.plan).replace("max_num_seqs: 32", "max_num_seqs: 16")
    chosen = replace(parse_plan(text, place="x"), id="chosen")
    told, _ = await steering.decide(START_S + 401.0, Trigger.MANUAL, given=chosen)
    assert told.verdict is DecisionVerdict.SWITCH

    # Killed and started again: plan, history and log are there.
    again_given = deployment(model, tmp_path, **CAPACITY)
    assert "in force when it last ran" in again_given.why
    assert again_given.plan == parse_plan(plan_yaml(steering.controller.plan), place="x")
    again = service(again_given, now_s=START_S + 500)
    assert again.controller.monitor.forecast() == steering.controller.monitor.forecast()
    assert list(again.controller.decisions)[-1] == told
    afresh = deployment(model, tmp_path, **CAPACITY, **{"control.resume": False})
    assert "a plan computed" in afresh.why

    file = str(given.state_file)
    shown = CliRunner().invoke(app, ["replay", file, "--json"])
    assert shown.exit_code == 0, shown.output
    rows = [msgspec.json.decode(line) for line in shown.output.splitlines()]
    # The last second was not written down yet when the last decision was made in it.
    assert len(rows) >= len(decisions) - 1
    for row, decision in zip(rows, decisions, strict=False):
        # Here nobody waits for a switch that takes no time.
        if row["reason"] != "switch_under_way":
            assert (row["verdict"], row["reason"]) == (decision.verdict, decision.reason)
    advice = CliRunner().invoke(
        app, ["replay", file, "--mode", "advise", "--set", "control.margin=9"]
    )
    assert advice.exit_code == 0, advice.output
    assert "switch," not in advice.output


async def test_a_kill_costs_no_count_that_was_saved(model: str, tmp_path: Path) -> None:
    given = deployment(model, tmp_path, **UNSIMULATED)
    steering = service(given, now_s=START_S)
    await fed(steering, given, CHATS, START_S, START_S + 45)
    await steering.save_seconds(START_S + 45.0)
    before = steering.controller.monitor.collector
    after = service(
        deployment(model, tmp_path, **UNSIMULATED), now_s=START_S + 50
    ).controller.monitor.collector
    assert after.newest_s == START_S + 44 == before.newest_s
    assert after.rows(START_S, START_S + 44) == before.rows(START_S, START_S + 44)


async def test_a_plan_file_counts_again_unless_a_cluster_is_taken_up(
    model: str, tmp_path: Path
) -> None:
    file = tmp_path / "plan.yaml"
    words = "workload_types: [{name: all}]\nreplicas: [{id: a, devices: ['cpu:0'], %s}]\n"
    file.write_text("id: given\n" + words % "shape: {precision: fp32}")
    more = {"plan": str(file), "control.mode": "advise"}
    steering = service(deployment(model, tmp_path, **more), now_s=START_S)
    chosen = parse_plan("id: chosen\n" + words % "shape: {precision: fp32}", place="x")
    await steering.decide(START_S + 1.0, Trigger.MANUAL, given=chosen)
    assert deployment(model, tmp_path, **more).plan.id == "given"
    lock = os.open(tmp_path / "state" / "keeper.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        assert deployment(model, tmp_path, **more).plan.id == "chosen"
        file.write_text(file.read_text() + "# another\n")
        assert deployment(model, tmp_path, **more).plan.id == "given"
    finally:
        os.close(lock)


async def test_shares_follow_what_is_ready_and_what_comes(model: str, tmp_path: Path) -> None:
    given = deployment(model, tmp_path)
    steering = service(given, now_s=START_S)
    plan = steering.controller.plan
    everyone = observed(plan, given)
    assert steering.routed(plan, everyone, START_S) == plan
    await fed(steering, given, CHATS, START_S, START_S + 15)
    routed = steering.routed(plan, everyone, START_S + 15)
    assert routed.id == plan.id
    gone = replace(everyone, replicas=everyone.replicas[1:])
    fewer = steering.routed(plan, gone, START_S + 15.1)
    lost = everyone.replicas[0].spec.id
    assert all(lost not in kind.shares for kind in fewer.planned_types)
    for kind in fewer.planned_types:
        assert sum(kind.shares.values()) == pytest.approx(1.0)
    assert steering.routed(plan, observed(plan, given, ReplicaPhase.LOADING), START_S) == plan


async def test_a_given_plan_keeps_its_shares_by_class(model: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(
        "workload_types: [{name: short, max_prompt_tokens: 300}, {name: long}]\n"
        "replicas:\n"
        "  - {id: a, devices: ['cpu:0'], shape: {precision: fp32, max_num_seqs: 16}}\n"
        "  - {id: b, devices: ['cpu:1'], shape: {precision: fp32, max_num_seqs: 16}}\n"
        "routing_shares: {short: {a: 1.0}, long: {b: 1.0}}\n"
    )
    assert deployment(model, tmp_path, plan=str(file)).mode is Mode.OFF
    given = deployment(model, tmp_path, plan=str(file), **{"control.mode": "advise"}, **UNSIMULATED)
    steering = service(given, now_s=START_S)
    plan = steering.controller.plan
    assert [dict(kind.shares) for kind in plan.planned_types] == [{"a": 1.0}, {"b": 1.0}]
    await fed(steering, given, CHATS, START_S, START_S + 60)
    assert steering.routed(plan, observed(plan, given), START_S) is plan
    wanted = parse_plan(file.read_text().replace("id: b", "id: c").replace("{b:", "{c:"), place="x")
    decision, _ = await steering.decide(START_S + 60.5, Trigger.MANUAL, given=wanted)
    assert decision.verdict is DecisionVerdict.SWITCH
    assert [spec.id for spec in steering.controller.plan.replicas] == ["a", "c"]


def test_a_controller_needs_something_to_plan_from(tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text("replicas: [{id: one, attach: {url: 'http://127.0.0.1:1'}}]")
    given = {"plan": str(plan), "served_model_name": "x", "state_dir": str(tmp_path / "s")}
    assert prepare(load_settings(None, given, {})).mode is Mode.OFF
    with pytest.raises(OServeError, match="the controller cannot plan"):
        prepare(load_settings(None, {**given, "control.mode": "auto"}, {}))


def test_a_plan_from_outside_gives_no_new_powers(model: str, tmp_path: Path) -> None:
    given = deployment(model, tmp_path)
    plain = plan_yaml(given.plan).encode()
    assert allowed_plan(plain, given.plan, given.devices).replicas == given.plan.replicas
    first = given.plan.replicas[0]
    for backend in ("engine_args: [--trust-remote-code]", "attach: {url: 'http://10.0.0.1:1'}"):
        text = f"replicas: [{{id: a, devices: ['{first.devices[0]}'], {backend}}}]"
        if "attach" in backend:
            text = f"replicas: [{{id: a, {backend}}}]"
        with pytest.raises(OServeError, match="not add one"):
            allowed_plan(text.encode(), given.plan, given.devices)
    same = replace(first, backend=VllmBackend(engine_args=("--seed", "7")))
    known = replace(given.plan, replicas=(same, *given.plan.replicas[1:]))
    assert allowed_plan(plan_yaml(known).encode(), known, given.devices)


def test_replay_names_a_file_that_holds_nothing(tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["replay", str(tmp_path / "none.sqlite")])
    assert isinstance(shown.exception, OServeError)
