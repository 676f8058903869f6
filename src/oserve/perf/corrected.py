"""A performance source scaled by observed speeds.

A profile from another machine, or from an idle one, is wrong by about one factor per shape. For a
shape without observations the factor follows from other shapes on the same kind of device, since a
slower processor affects all of them.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from oserve.core import Precision, ReplicaShape
from oserve.perf.power import ReplicaWork
from oserve.perf.roofline import Floats, StepModel
from oserve.perf.sequence_cache import SequenceCache
from oserve.perf.table import PerformanceSource

BOUNDS = (0.25, 4.0)
"""The bounds of credible speeds; a larger deviation means that something else was measured."""

# (device kind, tensor parallel size, pipeline parallel size, precision): besides its work, what
# determines the time of a step.
SpeedKey = tuple[str, int, int, Precision]


def speed_key(shape: ReplicaShape, device_kind: str = "") -> SpeedKey:
    """The key of a shape on its own kind of device, or on ``device_kind``."""
    return (
        device_kind or shape.device_kind,
        shape.tensor_parallel_size,
        shape.pipeline_parallel_size,
        shape.precision,
    )


def key_words(key: SpeedKey) -> str:
    """The key as in names of shapes, such as ``tp1-fp32``."""
    stages = f"pp{key[2]}" if key[2] > 1 else ""
    return f"tp{key[1]}{stages}-{key[3]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Speeds:
    """Observed speeds of shapes as multiples of the source's: at 0.5 a step takes twice as long."""

    known: Mapping[SpeedKey, float] = field(default_factory=dict)

    def of(self, shape: ReplicaShape) -> float:
        """The observed speed; without one, the median over observed shapes, or 1."""
        return self.of_key(speed_key(shape))

    def of_key(self, key: SpeedKey) -> float:
        """See ``of``; the kind "any" matches every kind of device."""
        if key in self.known:
            return self.known[key]
        near = [(own, speed) for own, speed in self.known.items() if key[0] in {own[0], "any"}]
        same = [speed for own, speed in near if own[1:] == key[1:]]
        found = same or [speed for _, speed in near]
        return statistics.median(found) if found else 1.0


@dataclass(frozen=True, slots=True)
class _Corrected:
    """A step model scaled by a speed."""

    step: StepModel
    speed: float

    def step_s(
        self,
        prefill_tokens: Floats | float,
        attended_tokens: Floats | float,
        decode_seqs: Floats | float,
        kv_tokens: Floats | float,
    ) -> Floats:
        """See ``StepModel``."""
        return (
            self.step.step_s(prefill_tokens, attended_tokens, decode_seqs, kv_tokens) / self.speed
        )


class CorrectedSource:
    """``base`` with step times at the observed speeds; memory and power are unchanged."""

    def __init__(self, base: PerformanceSource, speeds: Speeds) -> None:
        self.base = base
        self.speeds = speeds

    @property
    def origin(self) -> str:
        """See ``PerformanceSource``."""
        return self.base.origin

    def caveats(self, shapes: Sequence[ReplicaShape]) -> tuple[str, ...]:
        """See ``PerformanceSource``."""
        return self.base.caveats(shapes)

    def step_model(self, shape: ReplicaShape) -> StepModel:
        """See ``PerformanceSource``."""
        return _Corrected(self.base.step_model(shape), self.speeds.of(shape))

    def kv_tokens(self, shape: ReplicaShape) -> int:
        """See ``PerformanceSource``."""
        return self.base.kv_tokens(shape)

    def sequence_cache(self, shape: ReplicaShape) -> SequenceCache | None:
        """See ``PerformanceSource``."""
        return self.base.sequence_cache(shape)

    def power_w(self, shape: ReplicaShape, work: ReplicaWork, seconds: float) -> float:
        """See ``PerformanceSource``."""
        return self.base.power_w(shape, work, seconds)


def corrected(source: PerformanceSource, speeds: Speeds) -> PerformanceSource:
    """``source`` at these speeds; ``source`` itself if there are none."""
    return CorrectedSource(source, speeds) if speeds.known else source


def uncorrected(source: PerformanceSource) -> PerformanceSource:
    """The base of a corrected source; any other source itself."""
    return source.base if isinstance(source, CorrectedSource) else source
