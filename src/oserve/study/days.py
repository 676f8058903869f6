"""Scenes of a day: what is reported, what policies may learn from, and how large the load is.

Policies are tuned on the busiest hour of another day (or of the first part of a trace), since a
fleet is sized for its peak, and the search on a whole day would take too long.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import numpy as np

from oserve.core import OServeError
from oserve.evaluate.simulator import SimulatedServing, SimulatedTraffic, traffic_from
from oserve.plan.demand import Demand
from oserve.study.scene import Scene, SceneChoice, make_scene
from oserve.study.tune import Tuner
from oserve.traces import TraceRequest
from oserve.traces.days import DayPart, compress_day, synthesise_day

HOUR_S = 3600.0
_SAMPLE = 20_000
_ROUNDS = 7
_NEAR = 0.02
_LEAST_HOUR_S = 60.0
# The first guess of the load.
_RPS_PER_DEVICE = 0.5


class DayTraffic(Protocol):
    """A day at any load. ``hours`` are reported, each of which takes ``hour_s`` seconds."""

    @property
    def words(self) -> str: ...

    @property
    def hours(self) -> int: ...

    @property
    def hour_s(self) -> int: ...

    @property
    def rate_rps(self) -> float:
        """The mean rate at load 1."""
        ...

    @property
    def largest_load(self) -> float: ...

    def reported(self, load: float) -> list[TraceRequest]: ...

    def learned(self, load: float) -> list[TraceRequest]: ...


@dataclass(frozen=True, kw_only=True)
class DrawnDay:
    """A day drawn from rate curves.

    The learned day has other draws, and lengths from the first half of each part's pool; the
    reported one from the second half.
    """

    parts: Sequence[DayPart]
    learned_parts: Sequence[DayPart]
    compress: float
    seed: int
    source: str

    @property
    def words(self) -> str:
        return f"{self.source}; {_compressed(self.compress)}"

    @property
    def hours(self) -> int:
        return math.ceil(max(part.duration_s for part in self.parts) / HOUR_S)

    @property
    def hour_s(self) -> int:
        return hour_in_s(self.compress)

    @property
    def rate_rps(self) -> float:
        return sum(float(part.rates_rps.mean()) for part in self.parts)

    @property
    def largest_load(self) -> float:
        return math.inf

    def reported(self, load: float) -> list[TraceRequest]:
        halves = [part.halves()[1] for part in self.parts]
        return synthesise_day(halves, seed=self.seed, load=load, compress=self.compress)

    def learned(self, load: float) -> list[TraceRequest]:
        halves = [part.halves()[0] for part in self.learned_parts]
        return synthesise_day(halves, seed=self.seed + 1, load=load, compress=self.compress)


@dataclass(frozen=True, kw_only=True)
class TraceDay:
    """A request trace: policies learn from its first hours, by default its half, not reported."""

    requests: Sequence[TraceRequest]
    compress: float
    seed: int
    source: str
    learned_h: int | None = None

    def __post_init__(self) -> None:
        if self._split_h < 1 or self.hours < 1:
            raise OServeError(
                "the trace is shorter than two hours, or all of it is learned",
                place="--trace",
                remedy="use a longer trace, fewer --learned-hours, or experiments/main_table",
            )

    @property
    def words(self) -> str:
        return f"{self.source}, its last {self.hours} h; {_compressed(self.compress)}"

    @cached_property
    def _split_h(self) -> int:
        if not self.requests:
            return 0
        if self.learned_h is not None:
            return self.learned_h
        return int(self.requests[-1].arrival_s / HOUR_S + 0.5) // 2

    @property
    def hours(self) -> int:
        return math.ceil(self.requests[-1].arrival_s / HOUR_S - 1e-9) - self._split_h

    @property
    def hour_s(self) -> int:
        return hour_in_s(self.compress)

    @property
    def rate_rps(self) -> float:
        return len(self.requests) / self.requests[-1].arrival_s

    @property
    def largest_load(self) -> float:
        return self.compress

    def reported(self, load: float) -> list[TraceRequest]:
        split_s = self._split_h * HOUR_S
        part = [
            replace(r, arrival_s=r.arrival_s - split_s)
            for r in self.requests
            if r.arrival_s >= split_s
        ]
        return self._compressed(part, load)

    def learned(self, load: float) -> list[TraceRequest]:
        split_s = self._split_h * HOUR_S
        return self._compressed([r for r in self.requests if r.arrival_s < split_s], load)

    def _compressed(self, part: Sequence[TraceRequest], load: float) -> list[TraceRequest]:
        return compress_day(part, compress=self.compress, load=load, seed=self.seed)


def hour_in_s(compress: float) -> int:
    """Seconds that an hour takes. Raises OServeError unless they are whole, as rounds are."""
    seconds = HOUR_S / compress if compress > 0 else 0.0
    if not compress >= 1 or abs(seconds - round(seconds)) > 1e-9 or seconds < _LEAST_HOUR_S:
        raise OServeError(
            f"an hour cannot be compressed {compress:g} times",
            place="--compress",
            remedy="use a divisor of 3600 from 1 to 60, such as 6",
        )
    return round(seconds)


def busiest_hour(scene: Scene, traffic: SimulatedTraffic, hour_s: float) -> int:
    """The hour with the most work, by the costs of a token on the default shape."""
    tuner = Tuner(scene)
    costs = tuner.simulator.costs(tuner.default_shape)
    work = (
        traffic.prompt_tokens * costs.prefill_s_per_token
        + traffic.output_tokens * costs.decode_s_per_token
    )
    hours = (traffic.arrival_s // hour_s).astype(np.int64)
    return int(np.bincount(hours, weights=work).argmax())


def day_scene(
    choice: SceneChoice,
    *,
    reported: Sequence[TraceRequest],
    learned: Sequence[TraceRequest],
    hour_s: float,
    name: str,
    source_name: str,
) -> Scene:
    """The scene of a day: tuned on the busiest hour of ``learned``, reported on ``reported``.

    Types and classes are those of the whole learned day, with their rates in its busiest hour.
    """
    sample = learned[:: max(1, len(learned) // _SAMPLE)]
    scene = make_scene(choice, sample, source_name=source_name, name=name)
    traffic = traffic_from(reported, max_model_len=scene.context)
    history = traffic_from(learned, max_model_len=scene.context)
    hour = busiest_hour(scene, history, hour_s)
    peak = history.between(hour * hour_s, (hour + 1) * hour_s)
    longest = int(np.max(traffic.prompt_tokens + traffic.output_tokens))
    return replace(
        scene,
        traffic=traffic,
        peak=peak,
        history=history,
        demand=_with_rates(scene.demand, peak, hour_s),
        shapes=tuple(s for s in scene.shapes if scene.source.kv_tokens(s) >= longest),
    )


def _with_rates(demand: Demand, traffic: SimulatedTraffic, seconds: float) -> Demand:
    """The same types at their rates in some traffic: a request belongs to the nearest centre."""
    centres = np.log1p([demand.centres[kind.name] for kind in demand.types])
    points = np.log1p(np.stack([traffic.prompt_tokens, traffic.output_tokens], axis=1))
    nearest = np.argmin(((points[:, None, :] - centres[None]) ** 2).sum(axis=2), axis=1)
    # A type without requests in this hour still exists.
    counts = np.maximum(1, np.bincount(nearest, minlength=len(demand.types)))
    types = tuple(
        replace(kind, arrival_rate_rps=float(count) / seconds)
        for kind, count in zip(demand.types, counts.tolist(), strict=True)
    )
    return replace(demand, types=types)


def sized_load(
    choice: SceneChoice,
    day: DayTraffic,
    *,
    peak_share: float,
    said: Callable[[str], None] = lambda _: None,
) -> float:
    """The load at which the busiest reported hour is ``peak_share`` of the fleet's capacity.

    That is the capacity of ``static-best-tuned``, tuned on and measured with that hour.
    """
    load = min(day.largest_load, _RPS_PER_DEVICE * len(choice.devices) / day.rate_rps)
    load *= _capacity(choice, day, load, lambda tuner: tuner.default)
    tuned: list[SimulatedServing] = []

    def best(tuner: Tuner) -> SimulatedServing:
        tuned[:] = tuned or [tuner.best_tuned.serving]
        return tuned[0]

    # Each load draws its own requests, so the search does not converge to any precision.
    tried: list[tuple[float, float]] = []
    for _ in range(_ROUNDS):
        load = min(load, day.largest_load)
        scale = peak_share * _capacity(choice, day, load, best)
        said(f"at load {load:.4f} the busiest hour is at {peak_share / scale:.3f} of capacity")
        tried.append((abs(math.log(scale)), load))
        if abs(scale - 1.0) < _NEAR:
            break
        load *= scale
    return min(tried)[1]


def _capacity(
    choice: SceneChoice,
    day: DayTraffic,
    load: float,
    pick: Callable[[Tuner], SimulatedServing],
) -> float:
    """How many times as fast a serving holds the busiest hour. Raises OServeError for 0."""
    requests = day.reported(load)
    scene = day_scene(
        choice,
        reported=requests,
        learned=requests,
        hour_s=day.hour_s,
        name="sizing",
        source_name=day.words,
    )
    tuner = Tuner(scene)
    scale = tuner.measure(pick(tuner)).scale
    if scale <= 0.0:
        raise OServeError(
            "no load holds the SLO in the busiest hour",
            place="the day",
            remedy="use more devices, or another model",
        )
    return scale


def _compressed(compress: float) -> str:
    if compress == 1:
        return "in real time"
    return f"compressed {compress:g} times (an hour takes {HOUR_S / compress:g} s at its rate)"
