"""Memory, checked before anything starts: KV caches are sized, plans that do not fit refused."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from oserve.config import Settings
from oserve.core import DeploymentPlan, Device, ReplicaShape, ReplicaSpec
from oserve.engines.dial import LOCAL_NODE
from oserve.engines.holding import keeper_runs
from oserve.engines.main_memory import available_memory_bytes
from oserve.engines.memory_check import MemoryCheck, known_model, with_settings
from oserve.perf.profile import ProfileSource
from oserve.plan.planning import PlanRequest


def find_memory_check(settings: Settings, devices: tuple[Device, ...]) -> MemoryCheck:
    """The memory available for engines on these devices.

    Engines that a killed server left running will be taken over, so their memory counts as free; on
    other nodes, where it is not known what is free, all memory does.
    """
    free = float(available_memory_bytes())
    if any(device.node != LOCAL_NODE for device in devices):
        free = len(devices) * float(min(device.memory_bytes for device in devices))
    elif keeper_runs(Path(settings.state_dir)):
        free = max(free, float(sum(device.memory_bytes for device in devices)))
    return MemoryCheck(
        settings=settings.engines,
        devices=devices,
        model=known_model(settings.model),
        free_bytes=free,
    )


def shapes_that_fit(
    settings: Settings, devices: tuple[Device, ...], shapes: Sequence[ReplicaShape]
) -> tuple[ReplicaShape, ...]:
    """The shapes that fit; raises OServeError if none does."""
    memory = find_memory_check(settings, devices)
    found = memory.sized(shapes)[1]
    if not found:
        raise memory.refusal(memory.closest(shapes))
    return found


def fit_request(
    memory: MemoryCheck, request: PlanRequest, specs: Iterable[ReplicaSpec]
) -> tuple[MemoryCheck, PlanRequest]:
    """The memory check with sized KV caches, and the request with the shapes that fit.

    ``specs``: replicas of a given plan. Raises OServeError if no shape fits.
    """
    engines, shapes = memory.sized(request.shapes, specs)
    sized = with_settings(memory, engines)
    if not shapes:
        raise memory.refusal(memory.closest(request.shapes))
    kept = set(shapes)
    left_out = sized.left_out(shape for shape in request.shapes if shape not in kept)
    source = request.source
    if isinstance(source, ProfileSource):
        source = source.sized(engines.kv_cache_memory_bytes or 0)
    notes = tuple(note for note in (*request.notes, left_out) if note)
    return sized, replace(request, shapes=shapes, source=source, notes=notes)


def sized_for_plan(memory: MemoryCheck, plan: DeploymentPlan, place: str) -> MemoryCheck:
    """The memory check with KV caches sized for a plan.

    Raises OServeError if the plan does not fit, with the setting to change.
    """
    engines, _ = memory.sized((), plan.replicas)
    sized = with_settings(memory, engines)
    sized.check(plan.replicas, place)
    return sized
