"""How fast replicas really are, from what their engines have done: a factor for each shape.

The mean time of a step in some seconds of work is held against what the source of step times says
of such steps. Steps with a prompt and without are told apart by counts alone: P prompt tokens of F
prompts in n steps beside d decoding sequences are taken for F even prompts, each in as few steps as
the chunk budget allows. What an engine idles between steps does not count, so any load will do; but
fuller batches count more, since what a lone stream waits for is mostly not the model.

A shape that is not seen any more keeps its factor, but moves with the others: a machine that has
become slower has for all of them. Pure: time comes with the observation.
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

# A sample is of at least so many steps in at least so many seconds; of slower engines it takes
# longer, within what is kept.
_STEPS = 16
_SPAN_S = 4.0
_KEPT = 60
# The median of so many samples counts, once there are enough.
_MOST_SAMPLES = 20
_FEWEST_SAMPLES = 5
# What was not seen for so long is not seen any more, and after a while its samples are of old.
_SEEN_S = 8.0
_OLD_S = 30.0
# Batches of this many count in full.
_FULL_SEQS = 8.0
# Less of a change is not worth new tables: the estimate itself is off by some per cent.
_SLACK = 1.08
_PAUSE_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkInterval:
    """What an engine did between two looks: sums, the mean time of a step, tokens in its cache."""

    steps: float
    prompt_tokens: float
    prompts: float
    output_tokens: float
    step_s: float
    kv_tokens: float

    @property
    def decode_seqs(self) -> float:
        """Sequences that decode in a step, on average."""
        return max(0.0, self.output_tokens - self.prompts) / self.steps


def expected_s(source: PerformanceSource, shape: ReplicaShape, seen: WorkInterval) -> float:
    """What the source says that a step of this stretch takes, on average."""
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
    """Of one shape: (speed, weight) of the last stretches, and when the last one ended."""

    rows: deque[tuple[float, float]]
    last_s: float = -math.inf

    def median(self) -> float:
        """Half of the weight is below it."""
        rows = sorted(self.rows)
        half = sum(weight for _, weight in rows) / 2
        for speed, weight in rows:
            half -= weight
            if half <= 0:
                return speed
        return rows[-1][0]


class SpeedEstimator:
    """Follows replicas, asked once a second; ``source`` is what they are compared with."""

    def __init__(self, source: PerformanceSource) -> None:
        self.speeds = Speeds()
        self._source = source
        self._past: dict[tuple[str, float], deque[tuple[float, EngineWork]]] = {}
        self._samples: dict[SpeedKey, _Samples] = {}
        self._changed_s = -math.inf

    def observe(self, observation: Observation) -> Speeds | None:
        """Take in what was done; tells the speeds when they are others than before."""
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
            seen = _stretch(past, now_s, work, kv_tokens)
            past.append((now_s, work))
            if seen is not None:
                self._sample(shape, seen, now_s)
        self._past = {name: past for name, past in self._past.items() if name in there}
        return self._settled(now_s)

    def _sample(self, shape: ReplicaShape, seen: WorkInterval, now_s: float) -> None:
        try:
            expected = expected_s(self._source, shape, seen)
        except OServeError:
            return  # nothing is known of this shape that could be corrected
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
            if len(item.rows) >= _FEWEST_SAMPLES and now_s - item.last_s <= _SEEN_S
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
        # Where nothing is known of a shape yet, what it is taken for counts.
        before = [(self.speeds.of_key(key), speed) for key, speed in fresh.items()]
        if all(1 / _SLACK <= new / old <= _SLACK for old, new in before):
            return None
        self.speeds = found
        self._changed_s = now_s
        return found

    # -- memory ---------------------------------------------------------------------------------
    def state(self) -> list[dict[str, Any]]:
        """Plain data that ``restore`` takes, and that a status shows."""
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
        """Go on where ``state`` was taken; what does not fit is passed over."""
        self.speeds = speeds_from(state)


def speeds_from(state: Sequence[Mapping[str, Any]]) -> Speeds:
    """As ``SpeedEstimator.state`` tells them; what does not fit is passed over."""
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


def _stretch(
    past: Sequence[tuple[float, EngineWork]], now_s: float, work: EngineWork, kv_tokens: float
) -> WorkInterval | None:
    """The shortest that is long enough, up to now; ``None`` where there is none."""
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
