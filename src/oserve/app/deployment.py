"""What a server is to run: devices, plan and controller, settled before anything starts."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from oserve.app.switching.record import journal_folder, recover
from oserve.config import Settings, load_plan, parse_plan
from oserve.config.reading import read_text
from oserve.control.decision import Mode
from oserve.control.speed import speeds_from
from oserve.core import (
    AttachedBackend,
    DeploymentPlan,
    Device,
    OServeError,
    Precision,
    ReplicaShape,
    VllmBackend,
)
from oserve.engines.arguments import engine_arguments
from oserve.engines.devices import find_devices
from oserve.engines.holding import keeper_runs
from oserve.engines.processor import find_processor, plain_precisions
from oserve.engines.room import Room, known_model
from oserve.perf import TokenCosts, token_costs
from oserve.perf.corrected import Speeds
from oserve.plan import check_plan, default_plan
from oserve.plan.planning import PlanRequest
from oserve.startup.first_plan import FirstPlan, Knowledge, first_plan, know, planning_question
from oserve.startup.sizing import checked, find_room, fitted
from oserve.startup.store import StateStore


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerDeployment:
    """All that is settled before anything starts.

    ``question`` is what the controller plans from; ``None`` where there is none (mode off).
    ``fingerprint`` tells whether a plan of an earlier run still fits; ``given`` is of the plan file
    alone, empty without one. ``sized``: the settings' size of KV caches was computed here.
    ``speeds``: of replicas, as an earlier server saw them.
    """

    settings: Settings
    devices: tuple[Device, ...]
    plan: DeploymentPlan
    models: tuple[str, ...]
    why: str
    notes: tuple[str, ...] = ()
    costs: Callable[[ReplicaShape, str], TokenCosts] = token_costs
    mode: Mode = Mode.OFF
    question: PlanRequest | None = None
    fingerprint: str = ""
    given: str = ""
    speeds: Speeds = field(default_factory=Speeds)
    sized: bool = False

    @property
    def state_file(self) -> Path:
        """Where the controller keeps its memory."""
        return state_file(self.settings)


def state_file(settings: Settings) -> Path:
    """The controller's memory, under the state directory."""
    return Path(settings.state_dir) / "state.sqlite"


def prepare(settings: Settings) -> ServerDeployment:
    """Find the devices, read or compute the plan, check it. Starts nothing."""
    settings = _located(settings)
    devices = find_devices(settings.cluster.devices, settings.cluster.cpu_slots)
    plain = plain_precisions(devices, find_processor(settings.cluster.cpu_flags))
    knowledge = know(settings, devices)
    mode = _mode(settings, knowledge)
    question = None
    if knowledge.source is not None and (mode is not Mode.OFF or not settings.plan):
        question = planning_question(settings, devices, knowledge, plain)
    room = find_room(settings, devices)
    if question is not None:
        given = load_plan(settings.plan).replicas if settings.plan else ()
        room, question = fitted(room, question, given)
    stamp = _fingerprint(settings, devices, plain)
    resumed = _resumed(settings, room, stamp) if mode is not Mode.OFF else None
    speeds = remembered_speeds(state_file(settings), question)
    first = _plan(settings, devices, plain, knowledge, question, resumed, speeds)
    plan = first.plan
    check_plan(plan, devices, place=settings.plan or "plan")
    check_engines(plan, devices, settings)
    if any(isinstance(spec.backend, AttachedBackend) for spec in plan.replicas):
        mode = _without_controller(settings, "a replica of the plan is attached")
    attached_only = all(not spec.devices for spec in plan.replicas)
    if not settings.model and not (attached_only and settings.served_model_name):
        raise OServeError(
            "no model is named",
            place="model",
            remedy="oserve serve MODEL (with attached servers only: --served-model-name)",
        )
    name = settings.served_model_name or _model_name(settings.model)
    room = checked(room, plan, settings.plan or "plan")
    return ServerDeployment(
        settings=msgspec.structs.replace(settings, engines=room.settings),
        sized=room.settings != settings.engines,
        devices=devices,
        plan=plan,
        models=(name,),
        why=first.why,
        notes=(*first.notes, *room.words(plan.replicas)),
        costs=knowledge.costs,
        mode=mode,
        question=None if mode is Mode.OFF else question,
        fingerprint=stamp,
        given=_given(settings),
        speeds=speeds,
    )


def _mode(settings: Settings, knowledge: Knowledge) -> Mode:
    """As set; else auto where the plan is computed."""
    if knowledge.source is None or not settings.model:
        return _without_controller(settings, knowledge.missing or "no model is named")
    return settings.control.mode or (Mode.OFF if settings.plan else Mode.AUTO)


def _without_controller(settings: Settings, why: str) -> Mode:
    if settings.control.mode in {Mode.ADVISE, Mode.AUTO}:
        raise OServeError(
            f"no plans can be made, so that none can be decided on: {why}",
            place="control.mode",
            remedy="leave it out, or see docs/control.md for what is needed",
        )
    return Mode.OFF


def _fingerprint(
    settings: Settings, devices: tuple[Device, ...], plain: tuple[Precision, ...]
) -> str:
    """Of all that a plan depends on but the traffic."""
    engines = msgspec.structs.replace(settings.engines, log_dir="")
    cores = [(d.id, d.kind, d.cores) for d in devices]
    facts = (settings.model, engines, settings.planning, cores, plain)
    return hashlib.blake2b(msgspec.json.encode(facts), digest_size=8).hexdigest()


def _given(settings: Settings) -> str:
    """Of the plan file's text."""
    if not settings.plan:
        return ""
    return hashlib.blake2b(read_text(Path(settings.plan)).encode(), digest_size=8).hexdigest()


def _resumed(settings: Settings, room: Room, stamp: str) -> FirstPlan | None:
    """The plan that was in force when a server last ran on the same, if one did."""
    file = state_file(settings)
    if not stamp or not settings.control.resume or not file.is_file():
        return None
    saved = StateStore(file).memory("plan")
    if not isinstance(saved, dict) or saved.get("fingerprint") != stamp:
        return None
    if settings.plan and saved.get("given") != _given(settings):
        return None
    left = recover(journal_folder(settings), time.time())
    try:
        plan = parse_plan(str(saved["plan"]), place=str(file)) if left is None else left.plan
        check_plan(plan, room.devices, place=str(file))
        check_engines(plan, room.devices, settings)
        checked(room, plan, str(file))
    except (OServeError, KeyError):
        return None
    why = "which was in force when it last ran" if left is None else f"since {left.reason}"
    return FirstPlan(plan=plan, why=f"plan {plan.id!r}, {why} (control.resume)")


def remembered_speeds(file: Path, question: PlanRequest | None) -> Speeds:
    """What an earlier server saw of replicas, if it planned from the same step times."""
    if question is None or not file.is_file():
        return Speeds()
    saved = StateStore(file).memory("speeds")
    if not isinstance(saved, dict) or saved.get("source") != question.source.origin:
        return Speeds()
    seen = saved.get("seen")
    return speeds_from(seen) if isinstance(seen, list) else Speeds()


def _plan(
    settings: Settings,
    devices: tuple[Device, ...],
    plain: tuple[Precision, ...],
    knowledge: Knowledge,
    question: PlanRequest | None,
    resumed: FirstPlan | None,
    speeds: Speeds,
) -> FirstPlan:
    """As given, else as it was, else computed, else the default.

    A default also where traffic that was merely assumed, or once came, can be served by no shape:
    that is no reason not to serve.
    """
    # Who stops a server and starts it with a plan file means that plan; one that was killed means
    # to go on.
    if resumed is not None and (not settings.plan or keeper_runs(Path(settings.state_dir))):
        return resumed
    if settings.plan:
        plan = load_plan(settings.plan)
        return FirstPlan(plan=plan, why=f"plan {plan.id!r} from {settings.plan}")
    missing = knowledge.missing or "no model is named"
    if settings.model and question is not None:
        try:
            return first_plan(question, speeds)
        except OServeError as error:
            if settings.planning.trace or settings.planning.rates:
                raise
            missing = f"for {question.demand.source}, {error.message}; {error.remedy}"
    return FirstPlan(
        plan=default_plan(devices, _default_shapes(devices, plain[0], settings)),
        why=f"the default plan, since none can be computed: {missing}",
    )


def _model_name(model: str) -> str:
    """A folder serves under its own name, a hub model under its full id."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def check_engines(plan: DeploymentPlan, devices: tuple[Device, ...], settings: Settings) -> None:
    """Refuse now what no engine could be started with."""
    cpu = all(device.kind == "cpu" for device in devices)
    for spec in plan.replicas:
        if isinstance(spec.backend, VllmBackend):
            engine_arguments(
                spec,
                model=settings.model,
                served_model_name="",
                unix_socket="",
                platform="cpu" if cpu else "cuda",
                settings=settings.engines,
            )
    # How much memory is free does not matter here: engines that run take part of it.
    model = known_model(settings.model)
    room = Room(settings=settings.engines, devices=devices, model=model, free_bytes=0.0)
    room.check_contexts(plan.replicas)


def _default_shapes(
    devices: tuple[Device, ...], plain: Precision, settings: Settings
) -> tuple[ReplicaShape, ...]:
    """Two shapes that differ where it helps: a small chunk budget keeps short requests moving."""
    if devices and devices[0].kind != "cpu":
        return (
            ReplicaShape(precision=Precision.BF16, max_num_batched_tokens=1024, max_num_seqs=256),
            ReplicaShape(precision=Precision.BF16, max_num_batched_tokens=8192, max_num_seqs=256),
        )
    light = Precision.INT8 if Precision.INT8.value in settings.engines.variants else plain
    return (
        ReplicaShape(precision=light, max_num_batched_tokens=256, max_num_seqs=32),
        ReplicaShape(precision=plain, max_num_batched_tokens=1024, max_num_seqs=16),
    )


def _located(settings: Settings) -> Settings:
    """Put what has no place of its own under the state directory."""
    state = Path(settings.state_dir)
    try:
        state.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OServeError(
            f"cannot make it: {error.strerror}", place=str(state), remedy="set --state-dir"
        ) from None
    records = settings.gateway.records_file or str(state / "records.sqlite")
    logs = settings.engines.log_dir or str(state / "logs")
    overload = settings.gateway.overload
    wanted_ms = overload.ttft_ms or settings.planning.slo_ttft_ms
    overload = msgspec.structs.replace(overload, ttft_ms=wanted_ms)
    return msgspec.structs.replace(
        settings,
        gateway=msgspec.structs.replace(settings.gateway, records_file=records, overload=overload),
        engines=msgspec.structs.replace(settings.engines, log_dir=logs),
    )
