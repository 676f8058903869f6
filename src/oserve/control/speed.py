"""The real speed of replicas, estimated from the work of their engines: a factor for each shape.

The mean step time over some seconds of work is compared with what the source of step times predicts
for such steps. Only counts are known: P prompt tokens of F prompts in n steps with d decoding
sequences are taken for F equal prompts, each in as few steps as the chunk budget allows. Idle time
between steps does not count, so any load will do. Fuller batches weigh more, since a single stream
waits mostly for overheads outside the model.

A shape that is no longer observed keeps its factor relative to the others: if the machine becomes
slower, all shapes do.
"""

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from oserve.core import EngineWork, Observation, OServeError, Precision, ReplicaPhase, ReplicaShape
from oserve.perf.corrected import BOUNDS, SpeedKey, Speeds, key_words, speed_key
from oserve.perf.table import PerformanceSource

# A sample spans at least this many steps and seconds; slow engines take longer, up to the number of
# observations kept.
_STEPS = 16
_SPAN_S = 4.0
_KEPT = 60
# The estimate is the median of the last samples, once there are enough.
_MOST_SAMPLES = 20
_FEWEST_SAMPLES = 5
# Without a sample for this long, a shape is not observed any more; later its samples are stale.
_FRESH_S = 8.0
_OLD_S = 30.0
# Batches of this many sequences have full weight.
_FULL_SEQS = 8.0
# A smaller change is ignored, since the estimate itself errs by some per cent.
_SLACK = 1.08
_PAUSE_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkInterval:
    """The work of an engine between two observations: sums, mean step time, tokens in its cache."""

    steps: float
    prompt_tokens: float
    prompts: float
    output_tokens: float
    step_s: float
    kv_tokens: float

    @property
    def decode_seqs(self) -> float:
        """Mean number of decoding sequences per step."""
        return max(0.0, self.output_tokens - self.prompts) / self.steps


def expected_s(source: PerformanceSource, shape: ReplicaShape, seen: WorkInterval) -> float:
    """The mean step time in seconds that the source predicts for this interval."""
    step = source.step_model(shape)
    seqs, steps = seen.decode_seqs, seen.steps
    kv_tokens = seen.kv_tokens / shape.pipeline_parallel_size if seqs else 0.0
    if seen.prompt_tokens <= 0:
        return float(step.step_s(0.0, 0.0, seqs, kv_tokens))
    prompts = max(1.0, seen.prompts)
    length = seen.prompt_tokens / prompts
    pieces = math.ceil(length / max(1.0, shape.max_num_batched_tokens - seqs))
    # With more pieces than steps, some steps hold several.
    mixed = min(steps, prompts * pieces)
    tokens = seen.prompt_tokens / mixed
    with_prompt = float(step.step_s(tokens, tokens * length / 2, seqs, kv_tokens))
    without = float(step.step_s(0.0, 0.0, seqs, kv_tokens)) if seqs else with_prompt
    return (mixed * with_prompt + (steps - mixed) * without) / steps


@dataclass(slots=True)
class _Samples:
    """(speed, weight) of the last intervals of one shape, and when the last one ended."""

    rows: deque[tuple[float, float]]
    last_s: float = -math.inf

    def median(self) -> float:
        """The weighted median."""
        rows = sorted(self.rows)
        half = sum(weight for _, weight in rows) / 2
        for speed, weight in rows:
            half -= weight
            if half <= 0:
                return speed
        return rows[-1][0]


class SpeedEstimator:
    """Compares the replicas of each observation with ``source``."""

    def __init__(self, source: PerformanceSource) -> None:
        self.speeds = Speeds()
        self._source = source
        self._past: dict[tuple[str, float], deque[tuple[float, EngineWork]]] = {}
        self._samples: dict[SpeedKey, _Samples] = {}
        self._changed_s = -math.inf

    def compare_with(self, source: PerformanceSource) -> None:
        """Compare with another source of the same step times, which covers other devices."""
        self._source = source

    def observe(self, observation: Observation) -> Speeds | None:
        """Add an observation; returns the speeds if they have changed."""
        kinds = {device.id: device.kind for device in observation.devices}
        now_s = observation.now_s
        there = set()
        for state in observation.replicas:
            spec, work = state.spec, state.work
            if state.phase is not ReplicaPhase.READY or work is None or not spec.devices:
                continue
            name = (spec.id, state.started_s)
            there.add(name)
            shape = replace(spec.shape, device_kind=kinds.get(spec.devices[0], "any"))
            past = self._past.setdefault(name, deque(maxlen=_KEPT))
            kv_tokens = state.kv_cache_usage * self._source.kv_tokens(shape)
            seen = _interval(past, now_s, work, kv_tokens)
            past.append((now_s, work))
            if seen is not None:
                self._sample(shape, seen, now_s)
        self._past = {name: past for name, past in self._past.items() if name in there}
        return self._settled(now_s)

    def _sample(self, shape: ReplicaShape, seen: WorkInterval, now_s: float) -> None:
        try:
            expected = expected_s(self._source, shape, seen)
        except OServeError:
            return  # The source does not know this shape, so there is nothing to correct.
        low, high = BOUNDS
        speed = min(high, max(low, expected / seen.step_s))
        key = speed_key(shape)
        samples = self._samples.setdefault(key, _Samples(deque(maxlen=_MOST_SAMPLES)))
        if now_s - samples.last_s > _OLD_S:
            samples.rows.clear()
        samples.rows.append((speed, min(_FULL_SEQS, max(1.0, seen.decode_seqs))))
        samples.last_s = now_s

    def _settled(self, now_s: float) -> Speeds | None:
        if now_s - self._changed_s < _PAUSE_S:
            return None
        known = self.speeds.known
        fresh = {
            key: item.median()
            for key, item in self._samples.items()
            if len(item.rows) >= _FEWEST_SAMPLES and now_s - item.last_s <= _FRESH_S
        }
        moved = [speed / known[key] for key, speed in fresh.items() if key in known]
        drift = statistics.median(moved) if moved else 1.0
        low, high = BOUNDS
        others = {
            key: min(high, max(low, speed * drift))
            for key, speed in known.items()
            if key not in fresh
        }
        found = Speeds(known=others | fresh)
        # A shape that is new is compared with the speed assumed for it.
        before = [(self.speeds.of_key(key), speed) for key, speed in fresh.items()]
        if all(1 / _SLACK <= new / old <= _SLACK for old, new in before):
            return None
        self.speeds = found
        self._changed_s = now_s
        return found

    # -- memory ---------------------------------------------------------------------------------
    def state(self) -> list[dict[str, Any]]:
        """State for ``restore``, also shown in the status document."""
        return [
            {
                "shape": key_words(key),
                "device_kind": key[0],
                "tensor_parallel_size": key[1],
                "pipeline_parallel_size": key[2],
                "precision": key[3].value,
                "speed": round(speed, 4),
            }
            for key, speed in sorted(self.speeds.known.items())
        ]

    def restore(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Continue from ``state``; entries that do not fit are ignored."""
        self.speeds = speeds_from(state)


def speeds_from(state: Sequence[Mapping[str, Any]]) -> Speeds:
    """The speeds in a ``SpeedEstimator.state``; entries that do not fit are ignored."""
    known: dict[SpeedKey, float] = {}
    low, high = BOUNDS
    for item in state:
        try:
            key = (
                str(item["device_kind"]),
                int(item["tensor_parallel_size"]),
                int(item["pipeline_parallel_size"]),
                Precision(item["precision"]),
            )
            speed = float(item["speed"])
        except (KeyError, TypeError, ValueError):
            continue
        if math.isfinite(speed):
            known[key] = min(high, max(low, speed))
    return Speeds(known=known)


def _interval(
    past: Sequence[tuple[float, EngineWork]], now_s: float, work: EngineWork, kv_tokens: float
) -> WorkInterval | None:
    """The shortest interval up to now that is long enough; ``None`` if there is none."""
    for then_s, before in reversed(past):
        steps, gaps = work.steps - before.steps, work.gaps - before.gaps
        if steps < 0 or gaps < 0:
            return None
        if now_s - then_s < _SPAN_S or steps < _STEPS or gaps < _STEPS:
            continue
        step_s = (work.gap_s - before.gap_s) / gaps
        if step_s <= 0:
            return None
        return WorkInterval(
            steps=float(steps),
            prompt_tokens=float(max(0, work.prompt_tokens - before.prompt_tokens)),
            prompts=float(max(0, work.prompts - before.prompts)),
            output_tokens=float(max(0, work.output_tokens - before.output_tokens)),
            step_s=step_s,
            kv_tokens=kv_tokens,
        )
    return None
