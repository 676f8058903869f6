"""A brief measurement before the first plan, if no profile of the model on this CPU exists.

It takes at most a minute, starts of engines included, and measures first what a plan needs most:
every precision on one device, then on two. A fit to so few steps is coarse; while serving, OServe
corrects it, and ``oserve profile`` measures more exactly.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from oserve.config import Settings
from oserve.core import Device, OServeError, ReplicaShape
from oserve.engines.holding import keeper_runs
from oserve.engines.processor import find_processor, plain_precisions
from oserve.perf.known_models import find_model
from oserve.perf.model import ModelFacts
from oserve.perf.profile import (
    Profile,
    ProfileEntry,
    ProfileSource,
    ProfileStep,
    key_name,
    read_profile,
    shape_key,
    write_profile,
)
from oserve.profiler.client import EngineClient, EngineDescription
from oserve.profiler.measure import StepMeter
from oserve.profiler.profile import (
    ProfileReporter,
    default_shapes,
    engine_bounds,
    fitted_entry,
    make_profile,
    profile_devices,
    started_engine,
    temporary_cluster,
)
from oserve.profiler.series import EngineBounds, MeasuredPoint
from oserve.startup.first_plan import StepTimes, brief_file, find_step_times, wanted_precisions
from oserve.startup.lock import StateLock
from oserve.startup.sizing import shapes_that_fit

# One minute, less the time to end the engines.
LIMIT_S = 55.0
# The least time to measure a shape once its engine is up; with less left, none is started.
_LEAST_S = 10.0
_WINDOW = 12
_REPEATS = 2
_WARM = 4
# Prompts and points, the most important for a fit first.
_WANTED: tuple[int | MeasuredPoint, ...] = (
    16,
    MeasuredPoint(seqs=1, context=32),
    64,
    MeasuredPoint(seqs=4, context=32),
    128,
    256,
    MeasuredPoint(seqs=16, context=32, prompts=(64,)),
    MeasuredPoint(seqs=1, context=1024),
    MeasuredPoint(seqs=8, context=256, prompts=(256,)),
    1024,
)


@dataclass(slots=True)
class Pace:
    """The speed of an engine so far, to predict whether the next step fits into the time left."""

    prompt_s_per_token: float = 0.0
    gap_s_per_seq: float = 0.0

    def learn(self, wanted: int | MeasuredPoint, steps: Sequence[ProfileStep]) -> None:
        """Learn from a step that was just measured."""
        first = steps[0]
        if isinstance(wanted, MeasuredPoint):
            self.gap_s_per_seq = first.seconds / wanted.seqs
        else:
            self.prompt_s_per_token = first.seconds / wanted

    def expected_s(self, wanted: int | MeasuredPoint) -> float:
        """An upper estimate: larger steps take less time per token and per sequence."""
        if not isinstance(wanted, MeasuredPoint):
            return _REPEATS * wanted * self.prompt_s_per_token
        gap_s = wanted.seqs * self.gap_s_per_seq
        begin_s = wanted.seqs * wanted.context * self.prompt_s_per_token
        joined = sum(wanted.prompts) * self.prompt_s_per_token + len(wanted.prompts) * _WARM * gap_s
        return begin_s + (_WARM + _WINDOW) * gap_s + _REPEATS * joined


def brief_series(bounds: EngineBounds) -> tuple[int | MeasuredPoint, ...]:
    """Prompts and points within the bounds of an engine, the most important first."""
    series: list[int | MeasuredPoint] = []
    for wanted in _WANTED:
        if not isinstance(wanted, MeasuredPoint):
            if wanted <= min(bounds.chunk, bounds.max_model_len - 8):
                series.append(wanted)
            continue
        count = min(wanted.seqs, bounds.seqs - bool(wanted.prompts))
        own = replace(wanted, seqs=max(1, count))
        longest = own.context + 8 * _WINDOW
        if longest <= bounds.max_model_len and own.seqs * longest <= bounds.kv_tokens // 2:
            prompts = tuple(n for n in own.prompts if n + own.seqs <= bounds.chunk and count >= 1)
            series.append(replace(own, prompts=prompts))
    return tuple(dict.fromkeys(series))


def shapes_to_measure(settings: Settings) -> tuple[ReplicaShape, ...]:
    """Shapes to measure before a plan can be computed; none if enough is known, or it is off.

    Raises OServeError if the profile in the settings is invalid, or no shape fits.
    """
    if settings.planning.measure == "never" or settings.plan or not settings.model:
        return ()
    devices = profile_devices(settings)
    # Engines of a killed server may still run; the next server takes them over as they are.
    if devices[0].kind != "cpu" or keeper_runs(Path(settings.state_dir)):
        return ()
    try:
        model = find_model(settings.model)
    except OServeError:
        return ()
    times = find_step_times(settings, devices)
    if isinstance(times, StepTimes):
        source = times.source
        plain = plain_precisions(devices, find_processor(settings.cluster.cpu_flags))
        usable = {key[2] for key in source.keys()} if isinstance(source, ProfileSource) else set()  # noqa: SIM118
        stale = isinstance(source, ProfileSource) and _stale(settings, source.profile, devices)
        if usable & set(wanted_precisions(settings, source, plain)[0]) and not stale:
            return ()
    return shapes_that_fit(settings, devices, default_shapes(settings, devices, model))


def _stale(settings: Settings, used: Profile, devices: Sequence[Device]) -> bool:
    """Whether the profile is a brief one of another machine, or of other CPU slots."""
    file = brief_file(settings)
    if not file.is_file() or read_profile(file) != used:
        return False
    here = (find_processor().name, len(devices[0].cores))
    return (used.machine, used.cores_per_device) != here


async def measure_briefly(
    settings: Settings,
    shapes: Sequence[ReplicaShape],
    *,
    report: ProfileReporter,
    limit_s: float = LIMIT_S,
) -> Path | None:
    """Measure as many shapes as possible within ``limit_s``; returns the profile file, if any.

    Raises OServeError if another server uses the state folder.
    """
    lock = StateLock(Path(settings.state_dir))
    try:
        made = await _measured(settings, shapes, report, limit_s)
        if made is None:
            return None
        file = brief_file(settings)
        write_profile(file, made)
        return file
    finally:
        lock.release()


async def _measured(
    settings: Settings, shapes: Sequence[ReplicaShape], report: ProfileReporter, limit_s: float
) -> Profile | None:
    model = find_model(settings.model)
    devices = profile_devices(settings)
    loop = asyncio.get_running_loop()
    end_s = loop.time() + limit_s
    entries: list[ProfileEntry] = []
    version = ""
    async with temporary_cluster(settings, devices) as cluster:
        for index, shape in enumerate(shapes):
            if end_s - loop.time() < _LEAST_S:
                report.line(f"{shape.name} is left out: no time left")
                continue
            steps: list[ProfileStep] = []
            facts: EngineDescription | None = None
            report.line(f"starting {shape.name}")
            try:
                async with (
                    asyncio.timeout_at(end_s),
                    started_engine(cluster, devices, shape) as state,
                    EngineClient(state.endpoint, vocab=model.vocab) as client,
                ):
                    facts = await client.facts()
                    # The next shape may use the time that this one leaves.
                    share_s = (end_s - loop.time()) / (len(shapes) - index)
                    until_s = min(end_s, loop.time() + max(_LEAST_S, share_s))
                    await _collect(client, facts, shape, steps, report, until_s)
            except (OServeError, TimeoutError) as error:
                report.line(f"{shape.name} was not measured fully: {error or 'no time left'}")
            if facts is not None and (entry := _entry(model, devices, shape, facts, steps, report)):
                entries.append(entry)
                version = facts.version
    return make_profile(model, devices, entries, version) if entries else None


async def _collect(
    client: EngineClient,
    facts: EngineDescription,
    shape: ReplicaShape,
    steps: list[ProfileStep],
    report: ProfileReporter,
    until_s: float,
) -> None:
    """Add steps while there is time; steps that would take too long are skipped."""
    series = brief_series(engine_bounds(shape, facts))
    stages = shape.pipeline_parallel_size
    meter = StepMeter(
        client, facts, stages=stages, check_contention=False, window=_WINDOW, repeats=_REPEATS
    )
    pace = Pace()
    report.begin(key_name(shape_key(shape)), len(series))
    loop = asyncio.get_running_loop()
    # The first request of an engine takes longer than any other.
    await meter.once(series[0])
    for wanted in series:
        if loop.time() + pace.expected_s(wanted) <= until_s:
            found = await meter.once(wanted)
            pace.learn(wanted, found)
            steps.extend(found)
        report.advance(1)


def _entry(
    model: ModelFacts,
    devices: Sequence[Device],
    shape: ReplicaShape,
    facts: EngineDescription,
    steps: Sequence[ProfileStep],
    report: ProfileReporter,
) -> ProfileEntry | None:
    try:
        return fitted_entry(model, devices[0].kind, shape, facts, tuple(steps))
    except OServeError as error:
        report.line(f"{shape.name} is left out: {error.message}")
        return None
