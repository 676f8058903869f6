"""The power of replicas: idle, with a process, decoding and computing prompts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oserve.core import EngineWork, ReplicaShape
from oserve.perf.costs import measured_costs
from oserve.perf.device import find_device
from oserve.perf.known_models import find_model
from oserve.perf.power import ReplicaWork, replica_power_w, work_between
from oserve.perf.source import RooflineSource

SOURCE = RooflineSource(find_model("llama-2-70b"))
SHAPE = ReplicaShape(tensor_parallel_size=4, device_kind="H100")
H100 = find_device("H100").power


def decoding(batch: float, steps: float = 1000.0, busy_s: float = 100.0) -> ReplicaWork:
    return ReplicaWork(busy_s=busy_s, generated_tokens=batch * steps, steps=steps)


def test_the_measured_points_are_met() -> None:
    assert SOURCE.power_w(SHAPE, ReplicaWork(), 100) == 4 * H100.context_w == 4 * 122
    # Sequences of a batch over the four ranks.
    assert SOURCE.power_w(SHAPE, decoding(4 * 1), 100) == pytest.approx(4 * 300)
    assert SOURCE.power_w(SHAPE, decoding(4 * 128), 100) == pytest.approx(4 * 600)
    assert SOURCE.power_w(SHAPE, decoding(4 * 1024), 100) == 4 * H100.max_w
    half = SOURCE.power_w(SHAPE, decoding(4 * 1, busy_s=50), 100)
    assert half == pytest.approx(4 * (300 + 122) / 2)


@pytest.mark.parametrize(
    ("tensor_parallel_size", "batch", "watts"),
    [(8, 4, 258), (8, 8, 296), (8, 16, 334), (8, 32, 359), (4, 64, 503), (2, 64, 619)],
)
def test_wide_groups_draw_less_per_device(
    tensor_parallel_size: int, batch: int, watts: float
) -> None:
    """Within a fifth of figures for gpt-oss-120b on H100.

    They are the mean power of github.com/SemiAnalysisAI/InferenceX/issues/828 without the time in
    which no kernel ran, at ``context_w``.
    """
    shape = ReplicaShape(tensor_parallel_size=tensor_parallel_size, device_kind="H100")
    power_w = SOURCE.power_w(shape, decoding(batch), 100) / tensor_parallel_size
    assert power_w == pytest.approx(watts, rel=0.2)


def test_prompts_draw_the_most_for_as_long_as_they_take() -> None:
    step = SOURCE.step_model(SHAPE)
    chunk_s = float(step.step_s(2048.0, 2048.0**2 / 2, 0.0, 0.0))
    work = ReplicaWork(busy_s=2 * chunk_s, prompt_tokens=2048, generated_tokens=120, steps=30)
    power_w = SOURCE.power_w(SHAPE, work, 4 * chunk_s)
    assert power_w == pytest.approx(4 * (700 + 300 + 2 * 122) / 4)
    alone = ReplicaWork(busy_s=chunk_s, prompt_tokens=10**9, generated_tokens=1, steps=1)
    assert SOURCE.power_w(SHAPE, alone, chunk_s) == 4 * 700


@given(
    batch=st.floats(0, 2000),
    busy=st.floats(0, 1.5),
    prompt_tokens=st.floats(0, 1e6),
    seconds=st.floats(1e-3, 1e4),
    kind=st.sampled_from(["H100", "A100-80", "L40S", "B200", "cpu"]),
)
def test_a_started_replica_draws_between_context_and_limit(
    batch: float, busy: float, prompt_tokens: float, seconds: float, kind: str
) -> None:
    """And more work never draws less."""
    power, costs = find_device(kind).power, measured_costs(SOURCE.step_model(SHAPE), SHAPE)

    def watts(batch: float, busy: float, prompt_tokens: float) -> float:
        work = ReplicaWork(
            busy_s=busy * seconds,
            prompt_tokens=prompt_tokens,
            generated_tokens=batch * 10,
            steps=10,
        )
        return replica_power_w(power, costs, SHAPE, work, seconds)

    drawn = watts(batch, busy, prompt_tokens)
    slack = 1e-6
    assert 4 * power.context_w - slack <= drawn <= 4 * power.max_w + slack
    assert watts(batch + 1, busy, prompt_tokens) >= drawn - slack
    assert watts(batch, busy + 0.1, prompt_tokens) >= drawn - slack
    assert watts(batch, busy, prompt_tokens + 1000) >= drawn - slack


def test_no_time_is_no_work() -> None:
    assert SOURCE.power_w(SHAPE, decoding(3), 0.0) == 4 * H100.context_w


def test_an_engines_counters_become_work() -> None:
    shape = ReplicaShape(pipeline_parallel_size=2)
    before = EngineWork(steps=10, prompt_tokens=100, output_tokens=40, gaps=8, gap_s=1.0)
    after = EngineWork(steps=30, prompt_tokens=300, output_tokens=140, gaps=24, gap_s=9.0)
    work = work_between(before, after, shape)
    assert work == ReplicaWork(busy_s=5.0, prompt_tokens=200, generated_tokens=100, steps=20)
    assert work.batch == 5.0
    # The engine has started anew, or did nothing.
    assert work_between(after, before, shape) == ReplicaWork()
    assert work_between(after, after, shape) == ReplicaWork()
