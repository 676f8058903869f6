"""What is measured within an engine's limits, and how its tokens are counted."""

from itertools import pairwise

import pytest

from oserve.profiler.client import MeasuredStream
from oserve.profiler.contention import foreign_cpu_s
from oserve.profiler.series import EngineBounds, plan_series


@pytest.mark.parametrize("chunk", [64, 256, 2048, 8192])
@pytest.mark.parametrize("seqs", [1, 4, 32, 256])
@pytest.mark.parametrize("kv_tokens", [2048, 65536])
def test_nothing_beyond_the_limits_is_measured(chunk: int, seqs: int, kv_tokens: int) -> None:
    series = plan_series(
        EngineBounds(chunk=chunk, seqs=seqs, max_model_len=8192, kv_tokens=kv_tokens)
    )
    assert all(point.seqs < seqs for point in series.points if point.prompts)
    assert all(length <= chunk for length in series.prompts)
    for point in series.points:
        assert point.seqs <= seqs
        assert point.seqs * point.context < kv_tokens
        assert all(length + point.seqs <= chunk for length in point.prompts)
    assert len(set(series.points)) == len(series.points)


def test_about_two_dozen_steps() -> None:
    series = plan_series(EngineBounds(chunk=2048, seqs=32, max_model_len=8192, kv_tokens=65536))
    assert 20 <= series.step_count <= 30
    short = plan_series(EngineBounds(chunk=2048, seqs=32, max_model_len=512, kv_tokens=65536))
    assert max(point.context for point in short.points) < 512
    assert all(a < b for a, b in pairwise(short.prompts))


def test_an_event_that_carries_several_tokens_counts_for_each() -> None:
    seen = MeasuredStream()
    seen.feed(b'data: {"usage":{"prompt_tokens":3,"completion_tokens":1}}', 1.0)
    seen.feed(
        b'data: {"usage":{"completion_tokens":2}}\n\ndata: {"usage":{"completion_tokens": 4}}', 2.0
    )
    seen.feed(b"data: [DONE]", 3.0)
    assert seen.times == [1.0, 2.0, 2.0, 2.0]


def test_time_of_others_only_grows() -> None:
    first = foreign_cpu_s()
    second = foreign_cpu_s()
    assert first is None or second is None or second >= first - 0.1
