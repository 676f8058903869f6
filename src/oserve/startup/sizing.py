"""Memory before anything starts: caches sized for what will run, and refused what cannot."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from oserve.config import Settings
from oserve.core import DeploymentPlan, Device, ReplicaShape, ReplicaSpec
from oserve.engines.holding import keeper_runs
from oserve.engines.main_memory import available_memory_bytes
from oserve.engines.room import Room, known_model, with_settings
from oserve.perf.profile import ProfileSource
from oserve.plan.planning import PlanRequest


def find_room(settings: Settings, devices: tuple[Device, ...]) -> Room:
    """The room there is now for engines on these devices.

    Engines that a killed server left running are part of what will serve, so that the memory they
    hold counts as free.
    """
    free = float(available_memory_bytes())
    if keeper_runs(Path(settings.state_dir)):
        free = max(free, float(sum(device.memory_bytes for device in devices)))
    return Room(
        settings=settings.engines,
        devices=devices,
        model=known_model(settings.model),
        free_bytes=free,
    )


def fitting(
    settings: Settings, devices: tuple[Device, ...], shapes: Sequence[ReplicaShape]
) -> tuple[ReplicaShape, ...]:
    """Those of some shapes that may be started; raises OServeError where none fits."""
    room = find_room(settings, devices)
    found = room.sized(shapes)[1]
    if not found:
        raise room.refusal(room.closest(shapes))
    return found


def fitted(
    room: Room, question: PlanRequest, specs: Iterable[ReplicaSpec]
) -> tuple[Room, PlanRequest]:
    """The room with caches sized for all that may run, and the question about what fits in it.

    ``specs`` are replicas of a plan that is given. Raises OServeError where no shape fits.
    """
    engines, fitting = room.sized(question.shapes, specs)
    sized = with_settings(room, engines)
    if not fitting:
        raise room.refusal(room.closest(question.shapes))
    kept = set(fitting)
    left_out = sized.left_out(shape for shape in question.shapes if shape not in kept)
    source = question.source
    if isinstance(source, ProfileSource):
        source = source.sized(engines.kv_cache_memory_bytes or 0)
    notes = tuple(note for note in (*question.notes, left_out) if note)
    return sized, replace(question, shapes=fitting, source=source, notes=notes)


def checked(room: Room, plan: DeploymentPlan, place: str) -> Room:
    """The room with caches sized, after making sure that the plan fits.

    Raises OServeError that says what does not and what to set.
    """
    engines, _ = room.sized((), plan.replicas)
    sized = with_settings(room, engines)
    sized.check(plan.replicas, place)
    return sized
