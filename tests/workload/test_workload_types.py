"""Workload types: the same for any order, as many as the lengths hold, with names to tell apart."""

import itertools
import math
import random
import subprocess
import sys

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oserve.core import OServeError
from oserve.traces import MIX_CVS, TraceRequest, synthesise_mix
from oserve.workload.columns import Columns, Floats, columns_of
from oserve.workload.model import WorkloadModel
from oserve.workload.names import prompt_names, type_names
from oserve.workload.types import MAX_TYPES, fit_types

tokens = st.integers(0, 200_000) | st.integers(0, 5)
lengths = st.lists(st.tuples(tokens, tokens), min_size=1, max_size=60)
slow_fit = settings(derandomize=True, deadline=None, max_examples=25)


def sides(rows: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    return [prompt for prompt, _ in rows], [output for _, output in rows]


def mix(cv: float, seed: int = 1) -> Columns:
    return columns_of(
        synthesise_mix(rate_rps=20, duration_s=75, seed=seed, mix_cv=cv, change_period_s=60)
    )


@pytest.mark.slow
@given(lengths, st.none() | st.integers(1, 6), st.randoms(use_true_random=False))
@slow_fit
def test_types_are_those_of_the_requests_in_any_order(
    rows: list[tuple[int, int]], k: int | None, draw: random.Random
) -> None:
    model = fit_types(*sides(rows), k=k)
    shuffled = rows.copy()
    draw.shuffle(shuffled)
    assert fit_types(*sides(shuffled), k=k) == model
    assert 1 <= model.k <= min(k or 6, len(set(rows)))
    assert len(set(model.names)) == model.k
    assert all(name.isascii() and name == name.lower() and name.strip() for name in model.names)
    centres = [item.centre for item in model.types]
    assert centres == sorted(centres)

    index = model.assign(*sides(rows))
    shares = np.bincount(index, minlength=model.k) / len(rows)
    assert shares.tolist() == pytest.approx([item.share for item in model.types])
    assert min(shares) > 0
    for at, (prompt, output) in zip(index, rows, strict=True):
        point = (math.log1p(prompt), math.log1p(output))
        away = [math.dist(point, centre) for centre in centres]
        assert away[at] <= min(away) + 1e-9
    for at, item in enumerate(model.types):
        mine = [row for row, place in zip(rows, index, strict=True) if place == at]
        for position, mean, quantiles in (
            (0, item.prompt_tokens, item.prompt_quantiles),
            (1, item.output_tokens, item.output_quantiles),
        ):
            side = [row[position] for row in mine]
            assert mean == pytest.approx(sum(side) / len(side))
            assert min(side) <= quantiles.p50 <= quantiles.p95 <= quantiles.p99 <= max(side)


CORNERS = [(50, 5), (50, 1000), (5000, 5), (5000, 1000)]


@given(st.integers(1, 4), st.integers(0, 3), st.integers(0, 2**32 - 1))
@slow_fit
def test_lengths_that_fall_in_clumps_give_a_type_for_each(
    clumps: int, start: int, seed: int
) -> None:
    chosen = [CORNERS[(start + at) % 4] for at in range(clumps)]
    draw = random.Random(seed)
    rows = [
        (round(prompt * draw.uniform(0.95, 1.05)), round(output * draw.uniform(0.9, 1.1)))
        for prompt, output in chosen
        for _ in range(40)
    ]
    model = fit_types(*sides(rows))
    assert model.k == clumps
    assert {_nearest_corner(item.prompt_tokens, item.output_tokens) for item in model.types} == set(
        chosen
    )
    for item in model.types:
        prompt, output = _nearest_corner(item.prompt_tokens, item.output_tokens)
        assert item.prompt_tokens == pytest.approx(prompt, rel=0.1)
        assert item.output_tokens == pytest.approx(output, rel=0.2)


def _nearest_corner(prompt: float, output: float) -> tuple[int, int]:
    return min(
        CORNERS, key=lambda at: math.dist(map(math.log, at), map(math.log, (prompt, output)))
    )


@pytest.mark.parametrize("name", MIX_CVS)
def test_the_types_of_a_synthetic_mix_are_found(name: str) -> None:
    trace = mix(MIX_CVS[name])
    model = fit_types(trace.prompt_tokens, trace.output_tokens)
    assert sorted(model.names) == [
        "long prompt, long answer",
        "long prompt, short answer",
        "short prompt, long answer",
        "short prompt, short answer",
    ]


def test_a_seed_changes_little_and_nothing_twice() -> None:
    trace = mix(0.4)
    first, again, other = (
        fit_types(trace.prompt_tokens, trace.output_tokens, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again
    assert [item.share for item in other.types] == pytest.approx(
        [item.share for item in first.types], abs=0.01
    )


def test_many_requests_are_clustered_from_a_sample() -> None:
    draw = np.random.default_rng(0)
    big: Floats = np.exp(draw.normal(np.where(draw.random(60_000) < 0.5, 3.0, 8.0), 0.2)) + 1
    model = fit_types(big, np.full(60_000, 10.0))
    assert model.k == 2
    assert sum(item.share for item in model.types) == pytest.approx(1)
    assert fit_types(big[::-1], np.full(60_000, 10.0)) == model


def test_one_request_and_many_alike() -> None:
    one = fit_types([100], [20])
    assert one.names == ("short prompt, short answer",)
    assert fit_types([100] * 9, [20] * 9) == one
    assert fit_types([100] * 9, [20] * 9, k=4) == one
    assert (one.types[0].prompt_tokens, one.types[0].share) == (100.0, 1.0)
    near = fit_types([100, 101, 102, 103] * 9, [20, 21, 20, 20] * 9)
    assert near.k == 1
    assert fit_types([100, 101, 102, 103] * 9, [20, 21, 20, 20] * 9, k=3).k == 3


def test_a_model_is_plain_data() -> None:
    model = fit_types([10, 20, 5000, 6000], [5, 6, 700, 800])
    assert msgspec.json.decode(msgspec.json.encode(model), type=WorkloadModel) == model


@pytest.mark.parametrize(
    ("prompt", "output", "k", "place"),
    [
        ([], [], None, "trace"),
        ([5, -1], [5, 5], None, "request 2"),
        ([5, 5], [math.nan, 5], None, "request 1"),
        ([5, math.inf], [5, 5], None, "request 2"),
        ([5], [5], 0, "k"),
        ([5], [5], MAX_TYPES + 1, "k"),
    ],
)
def test_input_that_makes_no_sense(
    prompt: list[float], output: list[float], k: int | None, place: str
) -> None:
    with pytest.raises(OServeError) as caught:
        fit_types(prompt, output, k=k)
    assert caught.value.place == place
    with pytest.raises(ValueError, match="shapes"):
        fit_types([1, 2], [1])


typical = st.floats(0, 1e6) | st.sampled_from([1.0, 1.001, 100.0, 100.0001])


@given(st.lists(st.tuples(typical, typical), min_size=1, max_size=8))
@settings(derandomize=True, deadline=None)
def test_names_are_unique(centres: list[tuple[float, float]]) -> None:
    for names in (type_names(centres), prompt_names([prompt for prompt, _ in centres])):
        assert len(set(names)) == len(centres)
        assert all(name.isascii() and name == name.lower() for name in names)


@pytest.mark.parametrize(
    ("centres", "names"),
    [
        ([(100, 400)], ["short prompt, long answer"]),
        ([(9, 9), (99, 9)], ["very short prompt, short answer", "short prompt, short answer"]),
        ([(9, 9)], ["short prompt, short answer"]),
        (
            [(3000, 9), (6000, 9), (700, 9)],
            [
                "long prompt (3.0k), short answer",
                "long prompt (6.0k), short answer",
                "medium prompt, short answer",
            ],
        ),
        (
            [(3000, 300), (3000, 900)],
            ["long prompt, long answer (300)", "long prompt, long answer (900)"],
        ),
        (
            [(3000, 300), (3000, 900), (6000, 900)],
            [
                "long prompt (3.0k), long answer (300)",
                "long prompt (3.0k), long answer (900)",
                "long prompt (6.0k), long answer (900)",
            ],
        ),
    ],
)
def test_names_say_the_least_that_parts_them(
    centres: list[tuple[float, float]], names: list[str]
) -> None:
    assert list(type_names(centres)) == names


def test_a_stream_becomes_columns() -> None:
    rows = [TraceRequest(arrival_s=at, prompt_tokens=at, output_tokens=9) for at in (1, 2, 5)]
    columns = columns_of(iter(rows))
    assert columns.arrival_s.tolist() == [1.0, 2.0, 5.0]
    assert columns.prompt_tokens.tolist() == [1.0, 2.0, 5.0]
    assert columns.output_tokens.tolist() == [9.0] * 3
    assert columns_of([]).arrival_s.shape == (0,)


def test_the_gateway_loads_no_learning() -> None:
    code = (
        "import sys, oserve.workload; sys.exit(any(m in sys.modules for m in ('sklearn', 'numpy')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    later = "import sys, oserve.workload.classes; sys.exit('sklearn' in sys.modules)"
    subprocess.run([sys.executable, "-c", later], check=True)


def test_every_number_of_types_can_be_asked_for() -> None:
    trace = mix(0.4)
    fitted = [fit_types(trace.prompt_tokens, trace.output_tokens, k=k) for k in range(1, 8)]
    assert [model.k for model in fitted] == list(range(1, 8))

    def spread(model: WorkloadModel) -> float:
        index = model.assign(trace.prompt_tokens, trace.output_tokens)
        points = np.log1p(np.stack([trace.prompt_tokens, trace.output_tokens], axis=1))
        centres = np.array([item.centre for item in model.types])
        return float(np.square(points - centres[index]).sum())

    assert all(a > b for a, b in itertools.pairwise(map(spread, fitted)))
