"""A recording of what a controller observed, second by second, and its replay.

A recording holds all inputs of ``ControllerRuntime.observe`` and ``decide``. So a replay makes the
same decisions as the controller that was recorded, if it starts from the same plan and settings.
Backends and endpoints are left out: no decision depends on them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec

from oserve.control.decision import Decision
from oserve.control.evaluation import CandidateScore
from oserve.control.following import FollowScore
from oserve.control.runtime import ControllerRuntime
from oserve.control.tally import Batch
from oserve.core import (
    Device,
    Endpoint,
    EngineWork,
    Observation,
    OServeError,
    ReplicaPhase,
    ReplicaShape,
    ReplicaSpec,
    ReplicaState,
)


class RecordedReplica(msgspec.Struct, frozen=True, kw_only=True):
    """One replica at one second; see ``ReplicaState``."""

    id: str
    shape: ReplicaShape
    devices: tuple[str, ...]
    phase: ReplicaPhase
    since_s: float
    started_s: float
    running: int
    waiting: int
    kv_cache_usage: float
    work: EngineWork | None


class RecordedSecond(msgspec.Struct, frozen=True, kw_only=True):
    """One second; ``observed_s`` is the time of the observation of the cluster."""

    now_s: float
    observed_s: float
    batches: tuple[Batch, ...]
    replicas: tuple[RecordedReplica, ...]
    queued: int
    switching: bool


class Recording(msgspec.Struct, frozen=True, kw_only=True):
    """All seconds of a run on these devices."""

    devices: tuple[Device, ...]
    seconds: tuple[RecordedSecond, ...]


_RECORDING_DECODER = msgspec.json.Decoder(Recording)


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservedSecond:
    """The input of a controller runtime in one second.

    ``queued`` requests wait at the gateway. ``switching``: a switch has not ended.
    """

    now_s: float
    batches: Sequence[Batch]
    observation: Observation
    queued: int = 0
    switching: bool = False


class ObservationRecorder:
    """Records up to ``most_s`` seconds; later ones are dropped."""

    def __init__(self, most_s: int = 86_400) -> None:
        self._most_s = most_s
        self._devices: tuple[Device, ...] = ()
        self._seconds: list[RecordedSecond] = []

    def add(self, second: ObservedSecond) -> None:
        """Record one second."""
        if len(self._seconds) >= self._most_s:
            return
        self._devices = second.observation.devices
        self._seconds.append(
            RecordedSecond(
                now_s=second.now_s,
                observed_s=second.observation.now_s,
                batches=tuple(second.batches),
                replicas=tuple(_recorded(state) for state in second.observation.replicas),
                queued=second.queued,
                switching=second.switching,
            )
        )

    def encoded(self) -> bytes:
        """The recording so far as JSON."""
        recording = Recording(devices=self._devices, seconds=tuple(self._seconds))
        return msgspec.json.encode(recording)


def observed_seconds(data: bytes) -> Iterator[ObservedSecond]:
    """Read a recording. Raises OServeError if it is none."""
    try:
        recording = _RECORDING_DECODER.decode(data)
    except msgspec.DecodeError as error:
        raise OServeError(
            f"it is no recording of a controller: {error}",
            place="recording",
            remedy="record it again with this version",
        ) from error
    for second in recording.seconds:
        yield ObservedSecond(
            now_s=second.now_s,
            batches=second.batches,
            observation=Observation(
                now_s=second.observed_s,
                devices=recording.devices,
                replicas=tuple(_state(item) for item in second.replicas),
            ),
            queued=second.queued,
            switching=second.switching,
        )


def decide_second(
    runtime: ControllerRuntime, second: ObservedSecond
) -> tuple[Decision, CandidateScore | FollowScore | None] | None:
    """Pass one second to a runtime; make a decision if one is due."""
    trigger = runtime.observe(second.now_s, second.batches, second.observation, second.queued)
    if trigger is None:
        return None
    return runtime.decide(second.now_s, trigger, switching=second.switching)


def _recorded(state: ReplicaState) -> RecordedReplica:
    return RecordedReplica(
        id=state.spec.id,
        shape=state.spec.shape,
        devices=state.spec.devices,
        phase=state.phase,
        since_s=state.since_s,
        started_s=state.started_s,
        running=state.running,
        waiting=state.waiting,
        kv_cache_usage=state.kv_cache_usage,
        work=state.work,
    )


def _state(item: RecordedReplica) -> ReplicaState:
    return ReplicaState(
        spec=ReplicaSpec(id=item.id, shape=item.shape, devices=item.devices),
        phase=item.phase,
        endpoint=Endpoint(url=""),
        since_s=item.since_s,
        started_s=item.started_s,
        running=item.running,
        waiting=item.waiting,
        kv_cache_usage=item.kv_cache_usage,
        work=item.work,
    )
