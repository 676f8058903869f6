"""The deployment of a server: devices, plan and controller, decided before anything starts."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from oserve.config import Settings, load_plan, parse_plan
from oserve.config.policies import ladder_goal
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
)
from oserve.engines.devices import find_devices
from oserve.engines.holding import keeper_runs
from oserve.engines.memory_check import MemoryCheck
from oserve.engines.processor import find_processor, plain_precisions
from oserve.perf import TokenCosts, token_costs
from oserve.perf.corrected import Speeds
from oserve.perf.device import Link
from oserve.perf.source import DEFAULT_NETWORK
from oserve.plan import check_plan, default_plan
from oserve.plan.planning import PlanRequest
from oserve.startup.first_plan import (
    FirstPlan,
    NoStepTimes,
    StepTimes,
    find_step_times,
    first_plan,
    objective_note,
    plan_request_for,
)
from oserve.startup.folders import state_file
from oserve.startup.node_fleet import NodesFound
from oserve.startup.plan_check import check_engines
from oserve.startup.saved_state import SavedPlan, SavedSpeeds
from oserve.startup.sizing import find_memory_check, fit_request, sized_for_plan
from oserve.startup.store import StateStore
from oserve.startup.switch_facts import recovered_switch
from oserve.startup.tuning_check import check_tuning


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerDeployment:
    """All that is decided before anything starts.

    ``plan_request`` is what the controller plans from, ``None`` without a controller (mode off).
    ``fingerprint`` tells whether a saved plan still fits; ``given`` is the fingerprint of the plan
    file, empty without one. ``sized``: the size of KV caches was computed, not set. ``speeds``: of
    replicas, as an earlier server observed them. ``why``: one line on where the plan comes from.
    ``times``: where the step times of a simulation come from, if anywhere. ``network``: the link
    between nodes. ``asked``: the settings before the size of KV caches was computed.
    """

    settings: Settings
    devices: tuple[Device, ...]
    plan: DeploymentPlan
    models: tuple[str, ...]
    why: str
    notes: tuple[str, ...] = ()
    costs: Callable[[ReplicaShape, str], TokenCosts] = token_costs
    mode: Mode = Mode.OFF
    plan_request: PlanRequest | None = None
    fingerprint: str = ""
    given: str = ""
    speeds: Speeds = field(default_factory=Speeds)
    sized: bool = False
    times: StepTimes | None = None
    network: str | Link = DEFAULT_NETWORK
    asked: Settings = field(default_factory=Settings)

    @property
    def state_file(self) -> Path:
        """The file of the controller's state."""
        return state_file(self.settings)


def prepare(settings: Settings, nodes: NodesFound | None = None) -> ServerDeployment:
    """Find the devices; read or compute the plan, and check it. Starts nothing.

    ``nodes``: those to serve on, if not this machine. Raises OServeError if anything in the
    settings, the plan or the machines does not fit.
    """
    settings = _located(settings)
    nodes = nodes or _this_machine(settings)
    devices = nodes.devices
    plain = plain_precisions(devices, nodes.processor)
    times = find_step_times(settings, devices, nodes.network)
    mode = _mode(settings, times)
    request = None
    if isinstance(times, StepTimes) and (mode is not Mode.OFF or not settings.plan):
        request = plan_request_for(settings, devices, times, plain)
        # A name that does not exist must end the start before engines are running.
        ladder_goal(settings.planning, [kind.name for kind in request.demand.types])
    memory = find_memory_check(settings, devices)
    if request is not None:
        given = load_plan(settings.plan).replicas if settings.plan else ()
        memory, request = fit_request(memory, request, given)
    stamp = fingerprint_of(settings, devices, plain)
    resumed = _resumed(settings, memory, stamp) if mode is not Mode.OFF else None
    speeds = remembered_speeds(state_file(settings), request)
    first = _plan(settings, devices, plain, _missing(times), request, resumed, speeds)
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
    check_tuning(settings, plan, times)
    name = settings.served_model_name or _model_name(settings.model)
    memory = sized_for_plan(memory, plan, settings.plan or "plan")
    return ServerDeployment(
        settings=msgspec.structs.replace(settings, engines=memory.settings),
        sized=memory.settings != settings.engines,
        devices=devices,
        plan=plan,
        models=(name,),
        why=first.why,
        notes=(
            *([] if mode is Mode.OFF else [objective_note(settings, mode)]),
            *first.notes,
            *memory.notes(plan.replicas),
        ),
        costs=times.costs,
        mode=mode,
        plan_request=None if mode is Mode.OFF else request,
        fingerprint=stamp,
        given=_given(settings),
        speeds=speeds,
        times=times if isinstance(times, StepTimes) else None,
        network=nodes.network,
        asked=settings,
    )


def _this_machine(settings: Settings) -> NodesFound:
    return NodesFound(
        devices=find_devices(settings.cluster.devices, settings.cluster.cpu_slots),
        processor=find_processor(settings.cluster.cpu_flags),
    )


def _mode(settings: Settings, times: StepTimes | NoStepTimes) -> Mode:
    """The mode that is set; by default auto if the plan is computed, else off."""
    if isinstance(times, NoStepTimes) or not settings.model:
        return _without_controller(settings, _missing(times))
    return settings.control.mode or (Mode.OFF if settings.plan else Mode.AUTO)


def _missing(times: StepTimes | NoStepTimes) -> str:
    """Why no plan can be computed, if none can."""
    return times.reason if isinstance(times, NoStepTimes) else "no model is named"


def _without_controller(settings: Settings, why: str) -> Mode:
    if settings.control.mode in {Mode.ADVISE, Mode.AUTO}:
        raise OServeError(
            f"the controller cannot plan: {why}",
            place="control.mode",
            remedy="leave it out, or see docs/control.md for what is needed",
        )
    return Mode.OFF


def fingerprint_of(
    settings: Settings, devices: tuple[Device, ...], plain: tuple[Precision, ...]
) -> str:
    """A fingerprint of all that a plan depends on, except the traffic."""
    engines = msgspec.structs.replace(settings.engines, log_dir="")
    cores = [(d.id, d.kind, d.cores) for d in devices]
    facts = (settings.model, engines, settings.planning, cores, plain)
    return hashlib.blake2b(msgspec.json.encode(facts), digest_size=8).hexdigest()


def _given(settings: Settings) -> str:
    """A fingerprint of the plan file's text; empty without one."""
    if not settings.plan:
        return ""
    return hashlib.blake2b(read_text(Path(settings.plan)).encode(), digest_size=8).hexdigest()


def _resumed(settings: Settings, memory: MemoryCheck, stamp: str) -> FirstPlan | None:
    """The plan in force when the last server with this fingerprint ended, if there was one."""
    file = state_file(settings)
    if not stamp or not settings.control.resume or not file.is_file():
        return None
    saved = StateStore(file).saved("plan", SavedPlan)
    if saved is None or saved.fingerprint != stamp:
        return None
    if settings.plan and saved.given != _given(settings):
        return None
    left = recovered_switch(settings, time.time())
    try:
        plan = parse_plan(saved.plan, place=str(file)) if left is None else left.plan
        check_plan(plan, memory.devices, place=str(file))
        check_engines(plan, memory.devices, settings)
        sized_for_plan(memory, plan, str(file))
    except OServeError:
        return None
    why = "which was in force when it last ran" if left is None else f"since {left.reason}"
    return FirstPlan(plan=plan, why=f"plan {plan.id!r}, {why} (control.resume)")


def remembered_speeds(file: Path, request: PlanRequest | None) -> Speeds:
    """The speeds that an earlier server observed, if it planned from the same step times."""
    if request is None or not file.is_file():
        return Speeds()
    saved = StateStore(file).saved("speeds", SavedSpeeds)
    if saved is None or saved.source != request.source.origin:
        return Speeds()
    return speeds_from(saved.seen)


def _plan(
    settings: Settings,
    devices: tuple[Device, ...],
    plain: tuple[Precision, ...],
    missing: str,
    request: PlanRequest | None,
    resumed: FirstPlan | None,
    speeds: Speeds,
) -> FirstPlan:
    """The given plan, else the saved one, else a computed one, else the default.

    Also the default if no shape can serve assumed or recorded traffic: the server must start.
    """
    # A server that is stopped and started with a plan file gets that plan; after a kill, the next
    # server continues with the saved plan.
    if resumed is not None and (not settings.plan or keeper_runs(Path(settings.state_dir))):
        return resumed
    if settings.plan:
        plan = load_plan(settings.plan)
        return FirstPlan(plan=plan, why=f"plan {plan.id!r} from {settings.plan}")
    if settings.model and request is not None:
        try:
            return first_plan(request, speeds)
        except OServeError as error:
            if settings.planning.trace or settings.planning.rates:
                raise
            missing = f"for {request.demand.source}, {error.message}; {error.remedy}"
    return FirstPlan(
        plan=default_plan(devices, _default_shapes(devices, plain[0], settings)),
        why=f"the default plan, since none can be computed: {missing}",
    )


def _model_name(model: str) -> str:
    """The served name: of a folder its name, of a hub model its full id."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def _default_shapes(
    devices: tuple[Device, ...], plain: Precision, settings: Settings
) -> tuple[ReplicaShape, ...]:
    """Two different shapes: a small chunk budget keeps the latency of short requests low."""
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
    """Settings with default places of records and logs, in the state folder."""
    state = Path(settings.state_dir)
    try:
        state.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OServeError(
            f"cannot create it: {error.strerror}", place=str(state), remedy="set --state-dir"
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
