"""Prompt lengths: classes and the estimate from bytes."""

from hypothesis import given
from hypothesis import strategies as st

from oserve.core import LengthClass
from oserve.workload import PromptLengthEstimator, PromptSize, classify

CLASSES = (
    LengthClass(name="s", max_prompt_tokens=10),
    LengthClass(name="m", max_prompt_tokens=100),
    LengthClass(name="l"),
)


def text(size: int) -> PromptSize:
    return PromptSize(text_bytes={"messages": size})


@given(st.integers(0, 1000))
def test_each_length_has_the_first_class_that_holds_it(tokens: int) -> None:
    expected = "s" if tokens <= 10 else "m" if tokens <= 100 else "l"
    assert classify(tokens, CLASSES).name == expected


@given(st.floats(0.05, 1.5), st.lists(st.integers(100, 20_000), min_size=60, max_size=60))
def test_the_ratio_is_learned(ratio: float, sizes: list[int]) -> None:
    lengths = PromptLengthEstimator()
    # With fewer than three reports of about the same size the prior still counts.
    for size in (*sizes, 10_000, 10_000, 10_000):
        lengths.learn(text(size), max(1, round(size * ratio)))
    assert abs(lengths.estimate(text(10_000)) / (10_000 * ratio) - 1) < 0.35


def test_nonsense_is_not_learned() -> None:
    lengths = PromptLengthEstimator()
    lengths.learn(text(0), 5)
    lengths.learn(text(5), 0)
    lengths.learn(PromptSize(text_bytes={"messages": 500}, most_tokens=3), 3)
    assert lengths.tokens_per_byte("messages", 500) == 0.25
    assert lengths.estimate(text(0)) == 1


@given(st.lists(st.integers(1, 10**9), max_size=15), st.sampled_from([40, 400, 4000, 400_000]))
def test_odd_reports_do_not_spoil_the_ratio(odd: list[int], size: int) -> None:
    lengths = PromptLengthEstimator()
    for _ in range(40):
        lengths.learn(text(size), max(1, size // 5))
    for report in odd:
        lengths.learn(text(size), report)
    assert lengths.estimate(text(size)) == max(1, size // 5)


def test_fields_have_ratios_of_their_own() -> None:
    """A model whose template leaves the tools out, and one that spells them out."""
    for per_byte in (0.0, 0.4):
        lengths = PromptLengthEstimator()
        size = PromptSize(text_bytes={"messages": 400, "tools": 60_000})
        assert lengths.estimate(size) > 10_000
        for _ in range(4):
            lengths.learn(text(400), 100)
            lengths.learn(size, 100 + round(60_000 * per_byte))
        assert abs(lengths.estimate(size) - 100 - 60_000 * per_byte) < 20
        assert lengths.estimate(text(400)) == 100


def test_images_count_by_the_piece() -> None:
    lengths = PromptLengthEstimator()
    for _ in range(4):
        lengths.learn(text(400), 100)
        lengths.learn(PromptSize(text_bytes={"messages": 400}, parts=2), 100 + 2 * 1200)
    assert lengths.estimate(PromptSize(text_bytes={"messages": 400}, parts=3)) == 3700
    assert lengths.estimate(text(400)) == 100


def test_ids_are_certain_and_a_prompt_that_is_cut_is_no_longer() -> None:
    lengths = PromptLengthEstimator()
    assert lengths.estimate(PromptSize(tokens=77)) == 77
    assert lengths.estimate(PromptSize(tokens=77, most_tokens=5)) == 5
