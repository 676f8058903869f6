"""Framing finds the end of a body however the bytes are cut up."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oserve.wire import Framing, chunk, dechunk
from oserve.wire.framing import LAST_CHUNK, FramingError

payloads = st.lists(st.binary(min_size=1, max_size=40), max_size=8)


def cut(data: bytes, marks: list[int]) -> list[bytes]:
    points = sorted({min(mark, len(data)) for mark in marks} | {0, len(data)})
    return [data[a:b] for a, b in pairwise(points)]


@given(payloads, st.lists(st.integers(0, 400), max_size=10), st.binary(max_size=20))
def test_chunked_bodies_end_where_they_should(
    parts: list[bytes], marks: list[int], after: bytes
) -> None:
    body = b"".join(chunk(part) for part in parts) + LAST_CHUNK
    framing = Framing(None)
    used = 0
    for piece in cut(body + after, marks):
        if framing.complete:
            break
        used += framing.feed(piece)
    assert framing.complete
    assert used == len(body)
    assert dechunk(body) == b"".join(parts)


@given(st.integers(0, 50), st.integers(0, 80))
def test_length_bodies(length: int, sent: int) -> None:
    framing = Framing(length)
    assert framing.feed(b"x" * sent) == min(length, sent)
    assert framing.complete is (sent >= length)


@pytest.mark.parametrize("line", [b"-1", b"+5", b"0x5", b"1_0", b"", b"zz", b"5;x" * 100])
@pytest.mark.parametrize("whole", [True, False])
def test_broken_framing_is_refused(line: bytes, whole: bool) -> None:
    framing = Framing(None)
    pieces = [line + b"\r\n"] if whole else [line[:1], line[1:] + b"\r", b"\n"]
    with pytest.raises(FramingError):
        [framing.feed(piece) for piece in pieces]
