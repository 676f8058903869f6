"""Which heads are remembered, and how many."""

import contextlib

from hypothesis import given
from hypothesis import strategies as st

from oserve.wire.exchange import Exchange
from oserve.wire.known import KnownHeads, RequestHead
from oserve.wire.reader import RefusedError, RequestReader


def head(**fields: bytes) -> RequestHead:
    headers = {name.replace("_", "-").encode(): value for name, value in fields.items()}
    return RequestHead(b"GET", b"/", headers, 0)


def test_a_head_that_frames_in_another_way_is_not_kept() -> None:
    known = KnownHeads()
    for index, fields in enumerate(
        (
            head(transfer_encoding=b"chunked"),
            head(expect=b"100-continue"),
            head(upgrade=b"h2c"),
            head(traceparent=b"00-1"),
        )
    ):
        raw = b"GET / HTTP/1.1\r\nhost: %d\r\n\r\n" % index
        known.learn(raw, fields)
        assert known.get(raw) is None


def test_a_head_whose_lines_end_in_more_ways_than_one_is_not_kept() -> None:
    known = KnownHeads()
    for raw in (b"GET / HTTP/1.1\nhost: a\r\n\r\n", b"GET / HTTP/1.1\rhost: a\r\n\r\n"):
        known.learn(raw, head(host=b"a"))
        assert known.get(raw) is None


def test_the_oldest_heads_give_way_and_long_ones_are_not_kept() -> None:
    known = KnownHeads()
    raws = [b"GET /%d HTTP/1.1\r\nhost: a\r\n\r\n" % number for number in range(5000)]
    for raw in raws:
        known.learn(raw, head(host=b"a"))
    kept = [raw for raw in raws if known.get(raw) is not None]
    assert kept == raws[-len(kept) :]
    assert 0 < len(kept) < len(raws)
    long = b"GET / HTTP/1.1\r\nhost: a\r\nx: %b\r\n\r\n" % (b"a" * 2000)
    known.learn(long, head(host=b"a"))
    assert known.get(long) is None


class _Requests:
    """Keeps the requests that a reader hands over."""

    peer = ""

    def __init__(self) -> None:
        self.taken: list[Exchange] = []

    def take(self, request: Exchange) -> None:
        self.taken.append(request)

    def request_begun(self) -> None: ...

    def continue_wanted(self) -> None: ...

    def send(self, data: bytes, /) -> None: ...

    def finished(self, *, close: bool) -> None: ...

    def abort(self) -> None: ...


@given(st.lists(st.sampled_from([b"\r\n", b"\n", b"\r"]), max_size=5).map(b"".join))
def test_empty_lines_before_a_request_are_no_head(blank: bytes) -> None:
    known = KnownHeads()
    secret = b"POST / HTTP/1.1\r\nhost: a\r\nauthorization: Bearer a\r\ncontent-length: 2\r\n\r\nhi"
    with contextlib.suppress(RefusedError):
        RequestReader(_Requests(), known, 100).feed(blank + secret)
    other = _Requests()
    with contextlib.suppress(RefusedError):
        RequestReader(other, known, 100).feed(blank + b"no")
    assert not other.taken
