"""The running server: a cluster kept at a plan by the control loop, and a gateway in front."""

import asyncio
import contextlib
import logging
import shutil
import signal
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from oserve import __version__
from oserve.app.clock import LiveClock
from oserve.app.first_plan import FirstPlan, Knowledge, first_plan, know
from oserve.app.fronts import make_front
from oserve.app.status import gauges, status_document, summary
from oserve.config import Settings, api_keys, backend_keys, load_plan
from oserve.control.loop import ControlLoop
from oserve.control.reconcile import ReconcilePolicy, given_up
from oserve.control.table import routing_table
from oserve.core import (
    Action,
    DeploymentPlan,
    Device,
    DrainReplica,
    Observation,
    OServeError,
    Precision,
    ReplicaPhase,
    ReplicaShape,
    ReplicaState,
    StartReplica,
    StopReplica,
    VllmBackend,
)
from oserve.engines.arguments import engine_arguments
from oserve.engines.cluster import LocalCluster
from oserve.engines.devices import find_devices, has_bf16_instructions
from oserve.engines.settings import EngineSettings
from oserve.gateway.dispatch import Picture
from oserve.perf import TokenCosts, token_costs
from oserve.plan import check_plan, default_plan

_log = logging.getLogger("oserve.control")


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """All that is settled before anything starts."""

    settings: Settings
    devices: tuple[Device, ...]
    plan: DeploymentPlan
    models: tuple[str, ...]
    why: str
    notes: tuple[str, ...] = ()
    costs: Callable[[ReplicaShape, str], TokenCosts] = token_costs


def prepare(settings: Settings) -> Deployment:
    """Find the devices, read or compute the plan, check it. Starts nothing."""
    settings = _located(settings)
    devices = find_devices(settings.cluster.devices, settings.cluster.cpu_slots)
    knowledge = know(settings, devices)
    first = _plan(settings, devices, knowledge)
    plan = first.plan
    check_plan(plan, devices, place=settings.plan or "plan")
    _check_engines(plan, devices, settings)
    attached_only = all(not spec.devices for spec in plan.replicas)
    if not settings.model and not (attached_only and settings.served_model_name):
        raise OServeError(
            "no model is named",
            place="model",
            remedy="oserve serve MODEL (with attached servers only: --served-model-name)",
        )
    name = settings.served_model_name or _model_name(settings.model)
    return Deployment(
        settings=settings,
        devices=devices,
        plan=plan,
        models=(name,),
        why=first.why,
        notes=first.notes,
        costs=knowledge.costs,
    )


def _plan(settings: Settings, devices: tuple[Device, ...], knowledge: Knowledge) -> FirstPlan:
    """The plan as given; else computed; else, of a model nothing is known of, a plain default."""
    if settings.plan:
        plan = load_plan(settings.plan)
        return FirstPlan(plan=plan, why=f"plan {plan.id!r} from {settings.plan}")
    if settings.model and knowledge.source is not None:
        return first_plan(settings, devices, knowledge, _plain_precision(devices))
    missing = knowledge.missing or "no model is named"
    return FirstPlan(
        plan=default_plan(devices, _default_shapes(devices, settings.engines)),
        why=f"the default plan, since none can be computed: {missing}",
    )


def _model_name(model: str) -> str:
    """A folder serves under its own name, a hub model under its full id."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def _check_engines(plan: DeploymentPlan, devices: tuple[Device, ...], settings: Settings) -> None:
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


def _plain_precision(devices: tuple[Device, ...]) -> Precision:
    """Without instructions for it, bf16 is slower on a CPU than fp32."""
    on_cpu = bool(devices) and devices[0].kind == "cpu"
    return Precision.FP32 if on_cpu and not has_bf16_instructions() else Precision.BF16


def _default_shapes(
    devices: tuple[Device, ...], settings: EngineSettings
) -> tuple[ReplicaShape, ...]:
    """Two shapes that differ where it helps: a small chunk budget keeps short requests moving."""
    if devices and devices[0].kind != "cpu":
        return (
            ReplicaShape(precision=Precision.BF16, max_num_batched_tokens=1024, max_num_seqs=256),
            ReplicaShape(precision=Precision.BF16, max_num_batched_tokens=8192, max_num_seqs=256),
        )
    plain = _plain_precision(devices)
    light = Precision.INT8 if Precision.INT8.value in settings.variants else plain
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
    return msgspec.structs.replace(
        settings,
        gateway=msgspec.structs.replace(settings.gateway, records_file=records),
        engines=msgspec.structs.replace(settings.engines, log_dir=logs),
    )


class Server:
    """A deployment in operation; ``changed`` gets a line whenever a replica's phase changes."""

    def __init__(
        self, deployment: Deployment, *, changed: Callable[[str], None] = lambda _line: None
    ) -> None:
        settings = deployment.settings
        self._deployment = deployment
        self._changed = changed
        self._run_dir = Path(tempfile.mkdtemp(prefix="oserve-"))
        self._clock = LiveClock()
        control = settings.control
        self._policy = ReconcilePolicy(
            backoff_s=control.backoff_s,
            max_backoff_s=control.max_backoff_s,
            max_failures=control.max_failures,
            drain_limit_s=control.drain_limit_s,
        )
        self._ordered = settings.gateway.order.policy == "priority"
        self._cluster = LocalCluster(
            deployment.devices,
            model=settings.model,
            served_model_name=deployment.models[0],
            run_dir=self._run_dir,
            clock=self._clock,
            settings=settings.engines,
            api_keys=backend_keys(deployment.plan),
            on_change=self._wake,
        )
        self._loop = ControlLoop(
            self._cluster,
            self._clock,
            deployment.plan,
            policy=self._policy,
            interval_s=control.interval_s,
            observed=self._observed,
        )
        self._front = make_front(
            settings.gateway, deployment.models, api_keys(settings.gateway), self._run_dir
        )
        self._woken = asyncio.Event()
        self._line = ""
        self.ready = asyncio.Event()
        self.failed: dict[str, str] = {}

    async def start(self) -> int:
        """Open the port (clients hear 503 until a replica is ready); returns its number."""
        await self._loop.step()
        return await self._front.listen()

    async def run(self) -> None:
        """Keep the cluster at the plan until cancelled."""
        while True:
            self._woken.clear()
            await self._loop.step()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(
                    self._woken.wait(), self._deployment.settings.control.interval_s
                )

    async def close(self) -> None:
        """End: no new requests, running ones get their grace, then every process goes."""
        try:
            await self._front.close()
        finally:
            await self._cluster.close()
            shutil.rmtree(self._run_dir, ignore_errors=True)

    def _wake(self, _state: ReplicaState) -> None:
        """A replica changed: do not wait for the next round."""
        self._woken.set()

    def _observed(self, observation: Observation, actions: tuple[Action, ...]) -> None:
        plan = self._loop.plan
        for action in actions:
            _log.info("%s", _explained(action, observation))
        lost = given_up(plan, observation, self._policy)
        for name, failures in lost.items():
            if name not in self.failed:
                _log.error("replica %s given up: %s", name, failures.reason)
        self.failed = {name: failures.reason for name, failures in lost.items()}
        table = routing_table(
            plan,
            observation,
            ordered=self._ordered,
            expected=len(lost) < len(plan.replicas),
            costs=self._deployment.costs,
        )
        document = status_document(
            plan,
            observation,
            self._policy,
            model=self._deployment.models[0],
            version=__version__,
        )
        status = msgspec.Raw(msgspec.json.encode(document))
        self._front.publish(table, Picture(status=status, gauges=gauges(observation)))
        line = summary(observation.replicas)
        if line != self._line:
            self._line = line
            self._changed(line)
        phases = {state.spec.id: state.phase for state in observation.replicas}
        settled = all(
            phases.get(spec.id) is ReplicaPhase.READY or spec.id in lost for spec in plan.replicas
        )
        if settled:
            self.ready.set()


def _explained(action: Action, observation: Observation) -> str:
    """What is being done, and why."""
    match action:
        case StartReplica(spec=spec):
            failures = observation.failures.get(spec.id)
            why = "it is in the plan and not running"
            if failures is not None:
                why = f"it failed {failures.count} time(s), last: {failures.reason}"
            where = ",".join(spec.devices) or "its own server"
            return f"start replica {spec.id} ({spec.shape.name} on {where}): {why}"
        case DrainReplica(replica=name):
            return f"drain replica {name}: the plan no longer has it as it is"
        case StopReplica(replica=name):
            return f"stop replica {name}: it is drained, or not wanted any more"


async def serve_until_stopped(server: Server, *, announce: Callable[[int], None]) -> int:
    """Run until Ctrl-C or SIGTERM; returns the exit status.

    A second Ctrl-C ends without waiting for running requests.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    presses = 0

    def _on_signal() -> None:
        nonlocal presses
        presses += 1
        stop.set()
        if presses > 1:
            for task in asyncio.all_tasks(loop):
                if task.get_name() == "grace":
                    task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, _on_signal)
    running: asyncio.Task[None] | None = None
    status = 0
    try:
        port = await server.start()
        running = asyncio.create_task(server.run())
        ready = asyncio.create_task(server.ready.wait())
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait({running, ready, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if ready.done():
            announce(port)
            await asyncio.wait({running, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()
        ready.cancel()
        stopped.cancel()
    finally:
        if running is not None:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        closing = asyncio.create_task(server.close(), name="grace")
        with contextlib.suppress(asyncio.CancelledError):
            await closing
    return status
