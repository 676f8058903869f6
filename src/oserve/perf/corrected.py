"""Step times as they are where they were seen, from a source that says what they are elsewhere.

A profile of another machine, or of this one in a better mood, is off by about one factor per shape.
What a shape that was never seen running would do follows from the others on the same kind of
device: the processor is slower for all of them.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from oserve.core import Precision, ReplicaShape
from oserve.perf.roofline import Floats, StepModel
from oserve.perf.table import PerformanceSource

BOUNDS = (0.25, 4.0)
"""No speed is believed beyond these: whoever is off by more has measured something else."""

# (device kind, tensor parallel size, pipeline parallel size, precision): what the time of a step
# hangs on beside its work.
SpeedKey = tuple[str, int, int, Precision]


def speed_key(shape: ReplicaShape, device_kind: str = "") -> SpeedKey:
    """Of a shape on its kind of device, or on another one."""
    return (
        device_kind or shape.device_kind,
        shape.tensor_parallel_size,
        shape.pipeline_parallel_size,
        shape.precision,
    )


def key_words(key: SpeedKey) -> str:
    """``tp1-fp32``, as the names of shapes begin."""
    stages = f"pp{key[2]}" if key[2] > 1 else ""
    return f"tp{key[1]}{stages}-{key[3]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Speeds:
    """How fast shapes are, as multiples of what the source says: 0.5 takes twice as long."""

    known: Mapping[SpeedKey, float] = field(default_factory=dict)

    def of(self, shape: ReplicaShape) -> float:
        """As seen; else the median of the shapes that were; 1 where none was."""
        return self.of_key(speed_key(shape))

    def of_key(self, key: SpeedKey) -> float:
        """See ``of``; a shape on any kind of device is as on all of them."""
        if key in self.known:
            return self.known[key]
        near = [(own, speed) for own, speed in self.known.items() if key[0] in {own[0], "any"}]
        same = [speed for own, speed in near if own[1:] == key[1:]]
        found = same or [speed for _, speed in near]
        return statistics.median(found) if found else 1.0


@dataclass(frozen=True, slots=True)
class _Corrected:
    """A step model at another speed."""

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
    """``base`` with every step at the speed that was seen; memory and power are as they were."""

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

    def power_w(self, shape: ReplicaShape, busy: float) -> float:
        """See ``PerformanceSource``."""
        return self.base.power_w(shape, busy)


def corrected(source: PerformanceSource, speeds: Speeds) -> PerformanceSource:
    """``source`` at these speeds; itself where there are none."""
    return CorrectedSource(source, speeds) if speeds.known else source


def uncorrected(source: PerformanceSource) -> PerformanceSource:
    """What a corrected source was made from; itself where it is none."""
    return source.base if isinstance(source, CorrectedSource) else source
