"""What is measured before the first plan, and when."""

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oserve.config import Settings, load_settings
from oserve.core import Precision
from oserve.engines.processor import find_processor
from oserve.perf.device import find_device
from oserve.perf.known_models import find_model
from oserve.perf.profile import ProfileStep, shape_key, shipped_profile, write_profile
from oserve.perf.profile_fit import fit_entry
from oserve.perf.roofline import Coefficients, Roofline
from oserve.profiler.brief import Pace, brief_series, shapes_to_measure
from oserve.profiler.profile import profile_devices
from oserve.profiler.series import EngineBounds, MeasuredPoint
from oserve.startup.first_plan import brief_file


@pytest.fixture
def odd(model: str) -> str:
    """A model of which no profile is shipped."""
    file = Path(model) / "config.json"
    config = msgspec.json.decode(file.read_bytes())
    file.write_bytes(msgspec.json.encode({**config, "num_hidden_layers": 5}))
    return model


def settings(model: str, tmp_path: Path, **more: object) -> Settings:
    given = {
        "model": model,
        "state_dir": str(tmp_path / "state"),
        "cluster.devices": "cpu",
        "cluster.cpu_slots": 2,
        "cluster.cpu_flags": "avx2",
        **more,
    }
    return load_settings(None, given, {})


@given(
    chunk=st.sampled_from([16, 64, 256, 2048]),
    seqs=st.integers(1, 64),
    max_model_len=st.integers(256, 32768),
    kv_tokens=st.integers(4096, 1 << 17),
)
def test_the_course_stays_within_the_engine(
    chunk: int, seqs: int, max_model_len: int, kv_tokens: int
) -> None:
    series = brief_series(
        EngineBounds(chunk=chunk, seqs=seqs, max_model_len=max_model_len, kv_tokens=kv_tokens)
    )
    assert series
    assert len(set(series)) == len(series)
    for wanted in series:
        if isinstance(wanted, MeasuredPoint):
            assert 1 <= wanted.seqs <= seqs - bool(wanted.prompts)
            assert wanted.seqs * wanted.context < kv_tokens
            assert wanted.context < max_model_len
            assert all(length + wanted.seqs <= chunk for length in wanted.prompts)
        else:
            assert wanted <= min(chunk, max_model_len)


def test_steps_that_would_take_too_long_are_foreseen() -> None:
    pace = Pace()
    assert pace.expected_s(1024) == 0.0
    pace.learn(64, [step(64, 0, 0.064)])
    assert pace.expected_s(1024) == pytest.approx(2 * 1.024)
    pace.learn(MeasuredPoint(seqs=1, context=32), [step(0, 1, 0.05)])
    alone = pace.expected_s(MeasuredPoint(seqs=4, context=32))
    assert alone == pytest.approx(4 * 0.032 + 16 * 4 * 0.05)
    assert pace.expected_s(MeasuredPoint(seqs=4, context=32, prompts=(64,))) > alone


def step(prefill: float, seqs: float, seconds: float, kv_tokens: float = 0.0) -> ProfileStep:
    return ProfileStep(
        prefill_tokens=prefill,
        attended_tokens=prefill * prefill / 2,
        decode_seqs=seqs,
        kv_tokens=kv_tokens,
        seconds=seconds,
    )


def test_a_fit_to_a_brief_series_predicts_what_a_plan_needs(model: str) -> None:
    """Within a fifth, of steps as large as those of a busy replica."""
    facts = find_model(model)
    true = Coefficients(
        **{
            **shipped_coefficients(model),
            "all_reduce": Coefficients().all_reduce,
            "all_reduce_latency_s": Coefficients().all_reduce_latency_s,
        }
    )
    truth = Roofline(facts, find_device("cpu"), true, precision=Precision.FP32)
    rows: list[tuple[float, float, float]] = []
    for wanted in brief_series(
        EngineBounds(chunk=2048, seqs=32, max_model_len=8192, kv_tokens=65536)
    ):
        if isinstance(wanted, MeasuredPoint):
            held = float(wanted.seqs * wanted.context)
            rows += [(n, wanted.seqs, held) for n in (0, *wanted.prompts)]
        else:
            rows.append((wanted, 0, 0))
    steps = [
        step(n, seqs, float(truth.step_s(n, n * n / 2, seqs, held)), held) for n, seqs, held in rows
    ]
    found, error_percent = fit_entry(facts, "cpu", (1, 1, Precision.FP32), steps)
    assert error_percent < 5
    fitted = Roofline(facts, find_device("cpu"), found, precision=Precision.FP32)
    for load in ((2048.0, 2e6, 0.0, 0.0), (500.0, 125e3, 24.0, 6e3), (0.0, 0.0, 32.0, 16e3)):
        assert float(fitted.step_s(*load)) == pytest.approx(float(truth.step_s(*load)), rel=0.2)


def shipped_coefficients(model: str) -> dict[str, float]:
    shipped = shipped_profile(find_model(model), "cpu")
    assert shipped is not None
    return next(
        dict(item.coefficients) for item in shipped[1].entries if item.key == (1, 1, Precision.FP32)
    )


def test_a_model_that_nothing_is_known_of_is_measured(
    odd: str, tmp_path: Path, cpu_flags: str
) -> None:
    given = settings(
        odd,
        tmp_path,
        **{"cluster.cpu_flags": cpu_flags, "engines.variants": {"int8": "elsewhere"}},
    )
    fast = Precision.BF16 if "bf16" in cpu_flags else Precision.FP32
    keys = [shape_key(shape) for shape in shapes_to_measure(given)]
    assert keys == [(1, 1, fast), (1, 1, Precision.INT8), (2, 1, fast), (2, 1, Precision.INT8)]


def test_what_is_known_is_not_measured_again(model: str, tmp_path: Path, cpu_flags: str) -> None:
    """The shipped profile holds fp32: good enough on any CPU, unless other ones are asked for."""
    given = settings(model, tmp_path, **{"cluster.cpu_flags": cpu_flags})
    assert shapes_to_measure(given) == ()
    bf16 = settings(
        model,
        tmp_path,
        **{"cluster.cpu_flags": cpu_flags, "planning.precisions": ["bf16"]},
    )
    assert {shape.precision for shape in shapes_to_measure(bf16)} == {Precision.BF16}


def test_it_is_measured_once_a_machine(odd: str, tmp_path: Path) -> None:
    given = settings(odd, tmp_path)
    shipped = shipped_profile(replace(find_model(odd), layers=4), "cpu")
    assert shipped is not None
    assert shapes_to_measure(given)
    cores = len(profile_devices(given)[0].cores)
    for machine, known in ((find_processor().name, True), ("another one", False)):
        made = msgspec.structs.replace(
            shipped[1], model=find_model(odd), machine=machine, cores_per_device=cores
        )
        write_profile(brief_file(given), made)
        assert (shapes_to_measure(given) == ()) is known


def test_nothing_is_measured_where_it_is_not_wanted(odd: str, tmp_path: Path) -> None:
    never = settings(odd, tmp_path, **{"planning.measure": "never"})
    assert shapes_to_measure(never) == ()
    planned = settings(odd, tmp_path, plan="plan.yaml")
    assert shapes_to_measure(planned) == ()
    unknown = settings("someone/unheard-of", tmp_path)
    assert shapes_to_measure(unknown) == ()
