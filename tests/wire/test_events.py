"""Events come out the same however their lines end and wherever their bytes are cut."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oserve.wire import Dechunker, chunk
from oserve.wire.events import EventReader, EventsError, ServerSentEvent
from oserve.wire.framing import LAST_CHUNK, FramingError

ENDS = (b"\n", b"\r", b"\r\n")
LINES = st.sampled_from(
    [
        b"data: {}",
        b"data:x",
        b"data",
        b"data: ",
        b"data:  two",
        b": a comment",
        b":",
        b"event: message",
        b"id: 7",
        b"retry: 10",
        b"nobody knows: this",
        b"databases: 1",
        "data: é日".encode(),
    ]
)
EVENTS = st.lists(st.lists(LINES, min_size=1, max_size=4), max_size=6)


def cut(data: bytes, marks: list[int]) -> list[bytes]:
    points = sorted({min(mark, len(data)) for mark in marks} | {0, len(data)})
    return [data[a:b] for a, b in pairwise(points)]


def data_of(lines: list[bytes]) -> bytes | None:
    """What the standard makes of the lines of one event."""
    values = []
    for line in lines:
        name, _, value = line.partition(b":")
        if name == b"data":
            values.append(value[1:] if value[:1] == b" " else value)
    return b"\n".join(values) if values else None


@given(
    EVENTS,
    st.lists(st.sampled_from(ENDS), min_size=1, max_size=7),
    st.lists(st.integers(0, 400), max_size=12),
    st.booleans(),
    st.integers(0, 2),
)
def test_any_events_with_any_line_ends_in_any_pieces(
    events: list[list[bytes]], ends: list[bytes], marks: list[int], mark: bool, empty_lines: int
) -> None:
    text = b"\xef\xbb\xbf" if mark else b""
    used = 0
    for lines in events:
        for line in [*lines, *[b""] * (1 + empty_lines)]:
            end = ends[used % len(ends)]
            if text.endswith(b"\r") and not line and end == b"\n":
                end = b"\r"  # with the CR before it, it would be one line end
            text += line + end
            used += 1
    reader = EventReader()
    found: list[ServerSentEvent] = []
    for piece in cut(text, marks):
        found += reader.feed(piece)
    assert reader.end() is None
    assert [event.data for event in found] == [data_of(lines) for lines in events]
    expected = [b"".join(line + b"\n" for line in lines) + b"\n" for lines in events]
    assert [event.text for event in found] == expected


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=10))
def test_rubbish_is_read_alike_in_any_pieces(text: bytes, marks: list[int]) -> None:
    whole = EventReader()
    expected = whole.feed(text)
    reader = EventReader()
    found = [event for piece in cut(text, marks) for event in reader.feed(piece)]
    assert found == expected
    assert reader.end() == whole.end()


def test_an_event_is_told_as_soon_as_its_last_line_ends() -> None:
    for end in ENDS:
        reader = EventReader()
        assert [event.data for event in reader.feed(b"data: 1" + end + end)] == [b"1"]
        assert reader.idle is (end != b"\r")
        assert [event.data for event in reader.feed(b"data: 2" + end + end)] == [b"2"]


def test_the_last_event_may_lack_its_empty_line() -> None:
    for rest in (b"data: [DONE]", b"data: [DONE]\n", b"data: [DONE]\r\n"):
        reader = EventReader()
        assert reader.feed(b"data: 1\n\n" + rest)[0].data == b"1"
        assert reader.end() == ServerSentEvent(b"data: [DONE]\n\n", b"[DONE]")
        assert reader.end() is None


def test_an_event_that_never_ends_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oserve.wire.events._MAX_EVENT_BYTES", 1000)
    reader = EventReader()
    with pytest.raises(EventsError):
        [reader.feed(b"data: " + b"x" * 90) for _ in range(20)]


@given(
    st.lists(st.binary(min_size=1, max_size=40), max_size=6),
    st.lists(st.integers(0, 300), max_size=10),
    st.binary(max_size=9),
)
def test_chunks_come_off_in_any_pieces(parts: list[bytes], marks: list[int], after: bytes) -> None:
    body = b"".join(map(chunk, parts))
    dechunker = Dechunker()
    got = b"".join(dechunker.feed(piece) for piece in cut(body, marks))
    assert got == b"".join(parts)
    assert dechunker.idle
    # Trailers, and what follows the last chunk, are no payload.
    assert dechunker.feed(LAST_CHUNK[:3] + b"x-trailer: 1\r\n\r\n" + after) == b""


def test_broken_chunks_are_refused() -> None:
    for data in (b"zz\r\n", b"-1\r\n", b"x" * 300):
        with pytest.raises(FramingError):
            Dechunker().feed(data)
