"""Prompt lengths: classes and the estimate from bytes."""

from hypothesis import given
from hypothesis import strategies as st

from oserve.core import LengthClass
from oserve.workload import PromptLengthEstimator, classify

CLASSES = (
    LengthClass(name="s", max_prompt_tokens=10),
    LengthClass(name="m", max_prompt_tokens=100),
    LengthClass(name="l"),
)


@given(st.integers(0, 1000))
def test_each_length_has_the_first_class_that_holds_it(tokens: int) -> None:
    expected = "s" if tokens <= 10 else "m" if tokens <= 100 else "l"
    assert classify(tokens, CLASSES).name == expected


@given(st.floats(0.05, 1.5), st.lists(st.integers(100, 20_000), min_size=60, max_size=60))
def test_the_ratio_is_learned(ratio: float, sizes: list[int]) -> None:
    lengths = PromptLengthEstimator()
    for size in sizes:
        lengths.learn(size, max(1, round(size * ratio)))
    assert abs(lengths.estimate(10_000) / (10_000 * ratio) - 1) < 0.35


def test_nonsense_is_not_learned() -> None:
    lengths = PromptLengthEstimator()
    lengths.learn(0, 5)
    lengths.learn(5, 0)
    assert lengths.tokens_per_byte == 0.25
    assert lengths.estimate(0) == 1
