"""Readers, scaling, the generator and the metrics."""

import gzip
import math
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oserve.core import OServeError
from oserve.traces import (
    Outcome,
    OutcomeStatus,
    Slo,
    TraceRequest,
    fit_lengths,
    read_trace,
    summarise,
    synthesise,
)
from oserve.traces.metrics import percentile

CANONICAL = "arrival_s,input_tokens,output_tokens,model\n0.5,10,2,code\n1.25,20,0,conv\n"
AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2023-11-16 18:17:03.9799600,4808,10\n"
    "2023-11-16 18:17:04.0319569,110,27\n"
)
MOONCAKE = (
    '{"timestamp": 0, "input_length": 6955, "output_length": 52, "hash_ids": [1]}\n'
    '{"timestamp": 3000, "input_length": 10, "output_length": 5}\n'
)


def write(folder: Path, text: str, *, packed: bool = False) -> Path:
    path = folder / "trace"
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    return path


@pytest.mark.parametrize("packed", [True, False])
def test_formats_are_told_apart(tmp_path: Path, packed: bool) -> None:
    first, second = read_trace(write(tmp_path, CANONICAL, packed=packed))
    assert first == TraceRequest(arrival_s=0.5, prompt_tokens=10, output_tokens=2, model="code")
    assert second.output_tokens == 1
    first, second = read_trace(write(tmp_path, AZURE, packed=packed))
    assert first.arrival_s == 0.0
    assert second.arrival_s == pytest.approx(0.0519969)
    assert (second.prompt_tokens, second.output_tokens) == (110, 27)
    first, second = read_trace(write(tmp_path, MOONCAKE, packed=packed))
    assert (first.prompt_tokens, second.arrival_s) == (6955, 3.0)


def test_limit_and_duration(tmp_path: Path) -> None:
    rows = "".join(f"{index},5,5\n" for index in range(10, 30))
    path = write(tmp_path, "arrival_s,input_tokens,output_tokens\n" + rows)
    assert len(list(read_trace(path, limit=7))) == 7
    assert len(list(read_trace(path, until_s=5))) == 5
    assert len(list(read_trace(path))) == 20


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (CANONICAL + "2,-1,5,x\n", 4, "-1"),
        (CANONICAL + "2,1.5,5,x\n", 4, "1.5"),
        (CANONICAL + "2,many,5,x\n", 4, "many"),
        (CANONICAL + "nan,1,5,x\n", 4, "nan"),
        (CANONICAL + "2,1,inf,x\n", 4, "inf"),
        (CANONICAL + "1,1,5,x\n", 4, "backwards"),
        (CANONICAL + "2,1\n", 4, "2 fields"),
        ("arrival_s,input_tokens\n1,2\n", 1, "output_tokens"),
        (AZURE + "yesterday,1,2\n", 4, "yesterday"),
        (MOONCAKE + "{}\n", 3, "timestamp"),
        (MOONCAKE + "{\n", 3, "JSON"),
        ("hello\n", 1, "unknown format"),
        ("", 1, "empty"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, text: str, line: int, words: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(OServeError) as caught:
        list(read_trace(path))
    assert caught.value.place == f"{path}:{line}"
    assert words in caught.value.message


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(OServeError, match="No such file"):
        list(read_trace(tmp_path / "none"))
    path = write(tmp_path, CANONICAL * 50, packed=True)
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(OServeError):
        list(read_trace(path))


requests = st.lists(
    st.builds(
        TraceRequest,
        arrival_s=st.floats(0, 1e5),
        prompt_tokens=st.integers(1, 200_000),
        output_tokens=st.integers(1, 50_000),
    ),
    min_size=1,
    max_size=30,
)
factors = st.none() | st.floats(1e-3, 10)


@given(requests, st.integers(64, 20_000), factors, factors)
def test_scaled_requests_fit(
    trace: list[TraceRequest], context: int, prompt: float | None, output: float | None
) -> None:
    fitted = fit_lengths(trace, max_model_len=context, prompt_scale=prompt, output_scale=output)
    assert len(fitted) == len(trace)
    for before, after in zip(trace, fitted, strict=True):
        assert after.prompt_tokens >= 1
        assert after.output_tokens >= 1
        assert after.prompt_tokens + after.output_tokens <= context - 16
        assert after.arrival_s == before.arrival_s


def test_what_fits_is_left_alone() -> None:
    trace = [TraceRequest(arrival_s=0, prompt_tokens=100, output_tokens=100)]
    assert fit_lengths(trace, max_model_len=1000) == trace
    with pytest.raises(OServeError):
        fit_lengths(trace, max_model_len=10)


def test_the_generator_is_seeded_and_has_the_published_medians() -> None:
    def make(seed: int) -> list[TraceRequest]:
        return list(synthesise(rate_rps=50, duration_s=200, seed=seed))

    trace = make(1)
    assert trace == make(1)
    assert trace != make(2)
    assert 9500 < len(trace) < 10500
    for name, prompt, output in (("conv", 1020, 129), ("code", 1500, 13)):
        of_kind = [item for item in trace if item.model == name]
        assert statistics.median(i.prompt_tokens for i in of_kind) == pytest.approx(prompt, rel=0.1)
        assert statistics.median(i.output_tokens for i in of_kind) == pytest.approx(output, rel=0.1)


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0, 1))
def test_percentiles_are_bounded_and_monotone(values: list[float], share: float) -> None:
    at = percentile(values, share)
    assert min(values) <= at <= max(values)
    assert percentile(values, 0.0) == min(values)
    assert percentile(values, 1.0) == max(values)
    assert at <= percentile(values, min(1.0, share + 0.1)) or math.isclose(
        at, percentile(values, min(1.0, share + 0.1)), rel_tol=1e-9
    )


def test_percentile_interpolates() -> None:
    assert percentile([1, 2, 3, 4], 0.5) == 2.5
    assert percentile([], 0.5) == 0.0


def outcome(
    due_s: float, ttft_s: float, e2e_s: float, tokens: int, status: str = "completed"
) -> Outcome:
    return Outcome(
        due_s=due_s,
        sent_s=due_s,
        ttft_s=ttft_s,
        e2e_s=e2e_s,
        itl_s=(),
        prompt_tokens=1,
        output_tokens=tokens,
        status=OutcomeStatus(status),
    )


def test_summary_by_hand() -> None:
    outcomes = [
        outcome(0, 1, 3, 5),
        outcome(5, 3, 5, 3),
        outcome(8, 1, 2, 1),
        outcome(8, 1, 2, 9, "failed"),
        outcome(8, 1, 2, 9, "truncated"),
    ]
    assert outcomes[0].tpot_s == 0.5
    assert outcomes[2].tpot_s is None
    summary = summarise(outcomes, Slo(ttft_s=2.0, tpot_s=0.6))
    assert (summary.sent, summary.completed) == (5, 3)
    assert (summary.failed, summary.truncated) == (1, 1)
    assert summary.duration_s == 10.0
    assert summary.output_tokens_per_s == pytest.approx(0.9)
    assert summary.slo_attainment == pytest.approx(2 / 5)
    assert summary.goodput_rps == pytest.approx(0.2)
    assert summary.ttft_s.p50 == 1.0
    assert summary.longest_wait_s == 3.0
    assert summarise([], Slo()).sent == 0
