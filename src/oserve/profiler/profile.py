"""Profiling: start engines one at a time, or take a running one; measure, fit, write a profile."""

import asyncio
import signal
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from oserve.config import Settings
from oserve.core import (
    Device,
    Endpoint,
    OServeError,
    Precision,
    ReplicaPhase,
    ReplicaShape,
    ReplicaSpec,
    ReplicaState,
    StartReplica,
    StopReplica,
)
from oserve.engines.clock import LiveClock
from oserve.engines.cluster import EngineCluster
from oserve.engines.devices import find_devices
from oserve.engines.processor import find_processor, plain_precisions
from oserve.perf.known_models import find_model
from oserve.perf.model import ModelFacts
from oserve.perf.profile import Profile, ProfileEntry, ProfileStep, key_name, shape_key
from oserve.perf.profile_fit import fit_entry
from oserve.perf.shapes import splits
from oserve.profiler.client import EngineClient, EngineDescription
from oserve.profiler.measure import StepMeter
from oserve.profiler.series import EngineBounds, plan_series

_POLL_S = 0.1
_SERVED_NAME = "profiled"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileReporter:
    """Callbacks of a measurement: a line to show; the steps of a shape; steps done of it."""

    line: Callable[[str], None] = lambda _line: None
    begin: Callable[[str, int], None] = lambda _shape, _steps: None
    advance: Callable[[int], None] = lambda _steps: None


def profile_devices(settings: Settings) -> tuple[Device, ...]:
    """The devices of this machine, as ``oserve serve`` finds them."""
    return find_devices(settings.cluster.devices, settings.cluster.cpu_slots)


def default_shapes(
    settings: Settings, devices: Sequence[Device], model: ModelFacts
) -> tuple[ReplicaShape, ...]:
    """Every allowed precision, on one device and, if the model can be split, on two."""
    cpu = devices[0].kind == "cpu"
    plain = plain_precisions(devices, find_processor(settings.cluster.cpu_flags))[0]
    named = settings.planning.precisions
    variants = [Precision(name) for name in settings.engines.variants if name in set(Precision)]
    sizes = [1, 2] if len(devices) > 1 and splits(model, 2) else [1]
    return tuple(
        limited(ReplicaShape(tensor_parallel_size=size, precision=precision), cpu=cpu)
        for size in sizes
        for precision in dict.fromkeys(named or [plain, *variants])
    )


def limited(
    shape: ReplicaShape, *, cpu: bool, chunk: int | None = None, seqs: int | None = None
) -> ReplicaShape:
    """The shape with wide limits: large chunks, many sequences."""
    return replace(
        shape,
        max_num_batched_tokens=chunk or (2048 if cpu else 8192),
        max_num_seqs=seqs or (32 if cpu else 256),
    )


@asynccontextmanager
async def temporary_cluster(
    settings: Settings, devices: tuple[Device, ...]
) -> AsyncIterator[EngineCluster]:
    """A cluster for engines that are started one after another.

    Its processes and folders end with the context, also if the process gets a signal to end; see
    ``cleans_up_on_signal``.
    """
    with cleans_up_on_signal(), tempfile.TemporaryDirectory(prefix="oserve-") as run_dir:
        cluster = EngineCluster(
            devices,
            model=settings.model,
            served_model_name=_SERVED_NAME,
            run_dir=Path(run_dir),
            clock=LiveClock(),
            settings=settings.engines,
        )
        try:
            yield cluster
        finally:
            await cluster.close()


@contextmanager
def cleans_up_on_signal() -> Iterator[None]:
    """SIGTERM and SIGHUP cancel the current task, so that it cleans up as on Ctrl-C.

    Raises SystemExit afterwards, with the status of a process that such a signal ended.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None  # Inside a coroutine there always is one.
    received: list[int] = []

    def end(number: int) -> None:
        received.append(number)
        if len(received) == 1:
            task.cancel()

    # A process that was started to survive its terminal ignores SIGHUP already.
    closed = () if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (signal.SIGHUP,)
    for number in (signal.SIGTERM, *closed):
        loop.add_signal_handler(number, end, number)
    try:
        yield
    except asyncio.CancelledError:
        if not received:
            raise
        raise SystemExit(128 + received[0]) from None
    finally:
        for number in (signal.SIGTERM, *closed):
            loop.remove_signal_handler(number)


@asynccontextmanager
async def started_engine(
    cluster: EngineCluster, devices: Sequence[Device], shape: ReplicaShape
) -> AsyncIterator[ReplicaState]:
    """A ready engine of ``shape`` on the first devices; it ends with the context.

    Raises OServeError if there are too few devices or the engine cannot start.
    """
    if shape.device_count > len(devices):
        raise OServeError(
            f"{shape.name} takes {shape.device_count} devices, and there are {len(devices)}",
            place="--shape",
            remedy="choose a smaller shape, or more slots: --cpu-slots",
        )
    own = tuple(device.id for device in devices[: shape.device_count])
    spec = ReplicaSpec(id=shape.name, shape=shape, devices=own)
    await cluster.apply(StartReplica(spec=spec))
    try:
        yield await _ready(cluster, spec.id)
    finally:
        await cluster.apply(StopReplica(replica=spec.id))
        while (await cluster.observe()).replica(spec.id) is not None:  # noqa: ASYNC110
            await asyncio.sleep(_POLL_S)


async def _ready(cluster: EngineCluster, name: str) -> ReplicaState:
    while True:
        observation = await cluster.observe()
        state = observation.replica(name)
        if state is None:
            failure = observation.failures.get(name)
            raise OServeError(
                f"{name} could not start: {failure.reason if failure else 'it ended'}",
                place="engines",
                remedy="read its log in the log folder (--set engines.log_dir=...)",
            )
        if state.phase is ReplicaPhase.READY:
            return state
        await asyncio.sleep(_POLL_S)


async def profile_started(
    settings: Settings,
    devices: tuple[Device, ...],
    shapes: Sequence[ReplicaShape],
    *,
    rounds: int,
    report: ProfileReporter,
) -> Profile:
    """Start and measure each shape. A shape that cannot start is reported and left out.

    Raises OServeError if no shape could be measured.
    """
    model = find_model(settings.model)
    entries: list[ProfileEntry] = []
    failures: list[OServeError] = []
    version = ""
    async with temporary_cluster(settings, devices) as cluster:
        for shape in shapes:
            report.line(f"starting {shape.name}")
            try:
                async with started_engine(cluster, devices, shape) as state:
                    entry, facts = await measure_engine(
                        state.endpoint, model, devices[0].kind, shape, rounds=rounds, report=report
                    )
            except OServeError as error:
                failures.append(error)
                report.line(f"{shape.name} is left out: {error}")
                continue
            entries.append(entry)
            version = facts.version
    if not entries:
        raise failures[0]
    return make_profile(model, devices, entries, version)


async def profile_running(
    endpoint: Endpoint,
    model: ModelFacts,
    devices: tuple[Device, ...],
    shape: ReplicaShape,
    *,
    rounds: int,
    report: ProfileReporter,
) -> Profile:
    """Measure a running engine of this ``shape``."""
    entry, facts = await measure_engine(
        endpoint,
        model,
        devices[0].kind,
        shape,
        rounds=rounds,
        report=report,
        check_contention=False,
    )
    return make_profile(model, devices, [entry], facts.version)


async def measure_engine(
    endpoint: Endpoint,
    model: ModelFacts,
    device_kind: str,
    shape: ReplicaShape,
    *,
    rounds: int,
    report: ProfileReporter,
    check_contention: bool = True,
) -> tuple[ProfileEntry, EngineDescription]:
    """Measure and fit; ``check_contention``: see ``StepMeter``."""
    async with EngineClient(endpoint, vocab=model.vocab) as client:
        facts = await client.facts()
        series = plan_series(engine_bounds(shape, facts), rounds=rounds)
        report.begin(key_name(shape_key(shape)), series.step_count * series.rounds)
        meter = StepMeter(
            client,
            facts,
            stages=shape.pipeline_parallel_size,
            check_contention=check_contention,
            progress=report.advance,
        )
        steps = await meter.run(series)
    return fitted_entry(model, device_kind, shape, facts, steps), facts


def fitted_entry(
    model: ModelFacts,
    device_kind: str,
    shape: ReplicaShape,
    facts: EngineDescription,
    steps: tuple[ProfileStep, ...],
) -> ProfileEntry:
    """The measured steps and a model fitted to them.

    Raises OServeError if there are too few steps for a fit.
    """
    coefficients, error_percent = fit_entry(model, device_kind, shape_key(shape), steps)
    return ProfileEntry(
        tensor_parallel_size=shape.tensor_parallel_size,
        pipeline_parallel_size=shape.pipeline_parallel_size,
        precision=shape.precision,
        max_num_batched_tokens=shape.max_num_batched_tokens,
        max_num_seqs=shape.max_num_seqs,
        max_model_len=facts.max_model_len,
        kv_cache_memory_bytes=facts.kv_cache_memory_bytes,
        kv_tokens=facts.kv_tokens,
        coefficients={
            name: float(f"{value:.4g}") for name, value in coefficients.as_dict().items()
        },
        error_percent=round(error_percent, 2),
        steps=steps,
    )


def engine_bounds(shape: ReplicaShape, facts: EngineDescription) -> EngineBounds:
    """The limits of an engine of this shape."""
    return EngineBounds(
        chunk=shape.max_num_batched_tokens,
        seqs=shape.max_num_seqs,
        max_model_len=facts.max_model_len,
        kv_tokens=facts.kv_tokens,
        stages=shape.pipeline_parallel_size,
    )


def make_profile(
    model: ModelFacts, devices: Sequence[Device], entries: Sequence[ProfileEntry], version: str
) -> Profile:
    """The profile of a model on these devices."""
    cpu = devices[0].kind == "cpu"
    return Profile(
        model=model,
        device_kind=devices[0].kind,
        machine=find_processor().name if cpu else devices[0].kind,
        cores_per_device=len(devices[0].cores),
        engine=version,
        entries=tuple(entries),
    )
