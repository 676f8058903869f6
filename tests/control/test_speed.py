"""How fast replicas are, from what their engines have done."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oserve.control.speed import SpeedEstimator, speeds_from
from oserve.core import (
    Device,
    Endpoint,
    EngineWork,
    Observation,
    Precision,
    ReplicaPhase,
    ReplicaShape,
    ReplicaSpec,
    ReplicaState,
)
from oserve.perf.corrected import BOUNDS, Speeds, corrected, speed_key
from oserve.perf.profile import ProfileSource, _shipped

SOURCE = ProfileSource(_shipped()["tiny-llama-cpu"], name="shipped")
DEVICES = tuple(Device(id=f"cpu:{index}", kind="cpu") for index in range(4))


def shape(tp: int = 1, precision: Precision = Precision.FP32, chunk: int = 512) -> ReplicaShape:
    # As in a plan that a person wrote: the kind of device is where it stands.
    return ReplicaShape(
        tensor_parallel_size=tp, precision=precision, max_num_batched_tokens=chunk, max_num_seqs=32
    )


@dataclass
class Engine:
    """Decodes ``seqs`` streams; every ``prompt_every`` steps one ends and a prompt takes its place.

    ``speed``: as a multiple of what the source says.
    """

    name: str
    shape: ReplicaShape
    speed: float
    seqs: int = 8
    prompt: int = 200
    prompt_every: int = 10
    done: int = 0
    work: EngineWork = field(default_factory=EngineWork)

    def __post_init__(self) -> None:
        model = SOURCE.step_model(self.shape)
        self.steps_s = [
            float(model.step_s(tokens, tokens * tokens / 2, self.seqs, self.held))
            for tokens in (0, self.prompt)
        ]

    @property
    def held(self) -> int:
        return self.seqs * (self.prompt + 50)

    def run(self, seconds: float) -> None:
        """Whole steps until so much time is over."""
        while seconds > 0:
            self.done += 1
            joins = self.done % self.prompt_every == 0
            tokens = self.prompt if joins else 0
            step_s = self.steps_s[joins]
            seconds -= step_s / self.speed
            before = self.work
            self.work = EngineWork(
                steps=before.steps + 1,
                prompt_tokens=before.prompt_tokens + tokens,
                prompts=before.prompts + joins,
                output_tokens=before.output_tokens + self.seqs + joins,
                gaps=before.gaps + self.seqs,
                gap_s=before.gap_s + self.seqs * step_s / self.speed,
            )

    def state(self, device: str) -> ReplicaState:
        usage = self.held / SOURCE.kv_tokens(self.shape)
        return ReplicaState(
            spec=ReplicaSpec(id=self.name, shape=self.shape, devices=(device,)),
            phase=ReplicaPhase.READY,
            endpoint=Endpoint(),
            since_s=0.0,
            kv_cache_usage=usage,
            work=self.work,
        )


def watched(
    watch: SpeedEstimator,
    engines: list[Engine],
    seconds: int,
    *,
    begin_s: int = 0,
    each: Callable[[int], None] = lambda _second: None,
) -> list[tuple[float, Speeds]]:
    """Seconds of work; the corrections made and when."""
    changes = []
    for second in range(begin_s + 1, begin_s + seconds + 1):
        each(second)
        for engine in engines:
            engine.run(1.0)
        states = [e.state(d.id) for e, d in zip(engines, DEVICES, strict=False)]
        seen = Observation(now_s=float(second), devices=DEVICES, replicas=tuple(states))
        if (found := watch.observe(seen)) is not None:
            changes.append((float(second), found))
    return changes


@given(
    speed=st.floats(0.3, 3.5).filter(lambda value: not 0.9 < value < 1.1),
    tp=st.sampled_from([1, 2]),
    seqs=st.integers(1, 32),
    prompt=st.integers(16, 1500),
    prompt_every=st.integers(3, 60),
)
def test_a_speed_is_found_within_seconds_of_load(
    speed: float, tp: int, seqs: int, prompt: int, prompt_every: int
) -> None:
    own = shape(tp)
    # A prompt longer than the budget would take several steps; the engine here makes one of it.
    fits = min(prompt, own.max_num_batched_tokens - seqs)
    engine = Engine("a", own, speed, seqs=seqs, prompt=fits, prompt_every=prompt_every)
    watch = SpeedEstimator(SOURCE)
    changes = watched(watch, [engine], 30)
    assert changes
    assert watch.speeds.of(own) == pytest.approx(speed, rel=0.1)


def test_what_is_as_the_source_says_is_left_alone() -> None:
    for seqs in (1, 8, 32):
        engine = Engine("a", shape(), 1.0, seqs=seqs)
        assert watched(SpeedEstimator(SOURCE), [engine], 30) == []


def test_it_is_bounded_and_steady() -> None:
    for speed, bound in ((0.01, BOUNDS[0]), (8.0, BOUNDS[1])):
        watch = SpeedEstimator(SOURCE)
        changes = watched(
            watch,
            [Engine("a", shape(), speed)],
            40,
        )
        assert watch.speeds.of(shape()) == bound
        assert len(changes) == 1
    # A hiccup now and then is no new speed.
    engine, watch = Engine("a", shape(), 1.0), SpeedEstimator(SOURCE)

    def hiccup(second: int) -> None:
        engine.speed = 0.2 if second % 20 == 0 else 1.0

    assert watched(watch, [engine], 60, each=hiccup) == []


def test_shapes_that_were_not_seen_are_taken_to_be_as_slow() -> None:
    engine, other = Engine("a", shape(), 0.5), Engine("b", shape(tp=2), 0.9)
    watch = SpeedEstimator(SOURCE)
    watched(watch, [engine], 20)
    for seen in (shape(chunk=256), shape(tp=2), shape(precision=Precision.INT8)):
        assert watch.speeds.of(seen) == pytest.approx(0.5, rel=0.1)
    watched(watch, [engine, other], 20, begin_s=20)
    assert watch.speeds.of(shape(tp=2)) == pytest.approx(0.9, rel=0.1)
    assert watch.speeds.of(shape()) == pytest.approx(0.5, rel=0.1)
    # One is gone and the machine becomes slower: it has for both.
    engine.speed = 0.25
    watched(watch, [engine], 60, begin_s=40)
    assert watch.speeds.of(shape()) == pytest.approx(0.25, rel=0.1)
    assert watch.speeds.of(shape(tp=2)) == pytest.approx(0.45, rel=0.15)


def test_engines_that_tell_nothing_or_start_again_are_no_trouble() -> None:
    watch, engine = SpeedEstimator(SOURCE), Engine("a", shape(), 0.5)
    state = engine.state("cpu:0")
    for second in range(30):
        unknown = replace(state, spec=replace(state.spec, shape=shape(precision=Precision.FP8)))
        for told in (replace(state, work=None), unknown, replace(state, phase=ReplicaPhase.GONE)):
            seen = Observation(now_s=float(second), devices=DEVICES, replicas=(told,))
            assert watch.observe(seen) is None
    watched(watch, [engine], 5)
    engine.work = EngineWork()
    watched(watch, [engine], 80, begin_s=5)
    assert watch.speeds.of(shape()) == pytest.approx(0.5, rel=0.1)


def test_a_restart_goes_on_with_what_was_seen() -> None:
    watch = SpeedEstimator(SOURCE)
    watched(watch, [Engine("a", shape(), 0.5), Engine("b", shape(tp=2), 0.7)], 20)
    kept = json.loads(json.dumps(watch.state()))
    again = speeds_from(kept)
    assert again.known.keys() == watch.speeds.known.keys()
    for key, speed in watch.speeds.known.items():
        assert again.known[key] == pytest.approx(speed, abs=1e-3)
    odd = [*kept, {"shape": "x"}, {**kept[0], "speed": "fast"}, {**kept[0], "precision": "fp1"}]
    assert speeds_from(odd).known.keys() == again.known.keys()
    wild = speeds_from([{**kept[0], "speed": 99.0}, {**kept[1], "speed": float("nan")}])
    assert list(wild.known.values()) == [BOUNDS[1]]


@given(speed=st.floats(*BOUNDS))
def test_a_corrected_source_takes_that_much_longer(speed: float) -> None:
    own = replace(shape(), device_kind="cpu")
    source = corrected(SOURCE, Speeds(known={speed_key(own): speed}))
    load = (100.0, 5000.0, 4.0, 900.0)
    plain, slow = (float(s.step_model(own).step_s(*load)) for s in (SOURCE, source))
    assert slow * speed == pytest.approx(plain)
    assert source.kv_tokens(own) == SOURCE.kv_tokens(own)
    assert corrected(SOURCE, Speeds()) is SOURCE
