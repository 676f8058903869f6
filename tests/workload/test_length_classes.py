"""Length classes from types: every type is in the class that its own centre falls in."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oserve.traces import TraceRequest
from oserve.workload import classify
from oserve.workload.classes import APART, class_mixes, length_classes
from oserve.workload.columns import columns_of
from oserve.workload.model import LengthQuantiles, TypeStatistics, WorkloadModel
from oserve.workload.types import fit_types

QUANTILES = LengthQuantiles(p50=1, p95=1, p99=1)


def model_of(lengths: list[tuple[float, float]]) -> WorkloadModel:
    """Types with these typical lengths in tokens, in the order of a model."""
    return WorkloadModel(
        types=tuple(
            TypeStatistics(
                name=f"t{at}",
                centre=(math.log1p(prompt), math.log1p(output)),
                share=1 / len(lengths),
                prompt_tokens=prompt,
                output_tokens=output,
                prompt_quantiles=QUANTILES,
                output_quantiles=QUANTILES,
            )
            for at, (prompt, output) in enumerate(sorted(lengths))
        )
    )


pairs = st.tuples(st.integers(1, 100_000), st.integers(0, 5_000))
types_and_rates = st.lists(
    st.tuples(pairs, st.just(0.0) | st.floats(0, 50)), min_size=1, max_size=8
)


@given(types_and_rates)
@settings(derandomize=True, deadline=None, max_examples=150)
def test_classes_hold_their_types(rows: list[tuple[tuple[int, int], float]]) -> None:
    model = model_of([(float(prompt), float(output)) for (prompt, output), _ in rows])
    rates = [rate for _, rate in rows]
    classes, class_of = length_classes(model, rates)
    names = [item.name for item in classes]
    assert len(set(names)) == len(classes)
    assert set(class_of) == set(model.names)
    assert set(class_of.values()) == set(names)
    bounds = [item.max_prompt_tokens for item in classes]
    assert bounds[-1] is None
    finite = [bound for bound in bounds if bound is not None]
    assert len(finite) == len(classes) - 1
    assert finite == sorted(set(finite))
    assert all(bound >= 1 for bound in finite)
    assert all(item.output_tokens >= 1 for item in classes)
    for item in model.types:
        assert classify(round(item.prompt_tokens), classes).name == class_of[item.name]
    for lower, upper in itertools.pairwise(model.types):
        factor = (1 + upper.prompt_tokens) / (1 + lower.prompt_tokens)
        if abs(factor - APART) > 1e-9:
            assert (class_of[lower.name] == class_of[upper.name]) == (factor < APART)
    for at, name in enumerate(names):
        mine = [
            (item.output_tokens, rate)
            for item, rate in zip(model.types, rates, strict=True)
            if class_of[item.name] == name
        ]
        expected = classes[at].output_tokens
        assert min(1, *(out for out, _ in mine)) <= expected
        assert expected <= max(1, *(round(out) for out, _ in mine))


def test_types_that_differ_in_their_answers_alone_are_one_class() -> None:
    model = model_of([(200, 20), (210, 400), (3000, 20)])
    classes, class_of = length_classes(model, [3.0, 1.0, 5.0])
    assert class_of == {"t0": "short prompt", "t1": "short prompt", "t2": "long prompt"}
    short, long = classes
    assert (short.output_tokens, long.output_tokens) == (115, 20)
    assert short.max_prompt_tokens == math.floor(math.sqrt(211 * 3001) - 1)
    # Nobody comes: the plain mean.
    assert length_classes(model, [0.0, 0.0, 0.0])[0][0].output_tokens == 210


def test_classes_that_share_a_word_say_their_counts() -> None:
    names = [item.name for item in length_classes(model_of([(3000, 9), (8000, 9)]), [1, 1])[0]]
    assert names == ["long prompt (3.0k)", "long prompt (8.0k)"]


def test_one_type_is_one_class_without_a_bound() -> None:
    ((only,), class_of) = length_classes(fit_types([100], [20]), [1.0])
    assert (only.name, only.max_prompt_tokens, only.output_tokens) == ("short prompt", None, 20)
    assert class_of == {"short prompt, short answer": "short prompt"}


lengths = st.lists(
    st.tuples(st.integers(0, 20_000), st.integers(0, 3_000)), min_size=1, max_size=40
)


@given(lengths, st.integers(1, 4))
@settings(derandomize=True, deadline=None, max_examples=30)
def test_what_classes_hold_is_measured(rows: list[tuple[int, int]], k: int) -> None:
    prompts, outputs = [row[0] for row in rows], [row[1] for row in rows]
    columns = columns_of(
        TraceRequest(arrival_s=0, prompt_tokens=prompt, output_tokens=output)
        for prompt, output in rows
    )
    model = fit_types(prompts, outputs, k=k)
    classes, class_of = length_classes(model, [1.0] * model.k, requests=columns)
    mixes = class_mixes(classes, model, columns)
    kinds = model.assign(prompts, outputs)
    assert mixes.shape == (len(classes), model.k)
    for at, item in enumerate(classes):
        mine = [place for place, prompt in enumerate(prompts) if classify(prompt, classes) == item]
        if not mine:
            assert mixes[at].tolist() == [0.0] * model.k
            assert item.name in class_of.values()
            continue
        shares = np.bincount(kinds[mine], minlength=model.k) / len(mine)
        assert mixes[at].tolist() == pytest.approx(shares.tolist())
        expected = max(1, round(sum(outputs[place] for place in mine) / len(mine)))
        assert abs(item.output_tokens - expected) <= 1
