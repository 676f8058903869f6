"""Where boxes of tensors lie in a file, and the orders by which a hatch reads and writes them."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oserve.engines.weights.relay_orders import (
    SEND,
    TAKE,
    FileRange,
    Order,
    OrderReader,
    passed,
    range_of,
)


@st.composite
def boxes(draw: Any) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    """A shape, and a box of it that is not empty."""
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    box = []
    for size in shape:
        start = draw(st.integers(0, size - 1))
        box.append((start, draw(st.integers(start + 1, size))))
    return shape, tuple(box)


def indices(place: FileRange) -> list[int]:
    starts = range(place.offset, place.end, place.stride)
    return [at for start in starts for at in range(start, start + place.row_bytes)]


@given(boxes())
def test_a_range_has_the_bytes_of_its_box_in_their_order(
    found: tuple[tuple[int, ...], tuple[tuple[int, int], ...]],
) -> None:
    shape, box = found
    place = range_of(100, shape, 2, box)
    whole = 100 + np.arange(2 * math.prod(shape)).reshape(*shape, 2)
    expected = whole[tuple(slice(*edge) for edge in box)].reshape(-1).tolist()
    if place is None:
        # Rows at unequal distances: two dimensions behind the first are cut.
        cut = [size != stop - start for size, (start, stop) in zip(shape, box, strict=True)]
        assert sum(cut[1:]) > 1
        return
    assert indices(place) == expected
    assert place.size == len(expected)


@given(boxes(), st.integers(1, 40))
def test_pieces_of_a_range_follow_each_other(
    found: tuple[tuple[int, ...], tuple[tuple[int, int], ...]], size: int
) -> None:
    place = range_of(0, found[0], 3, found[1])
    if place is None:
        return
    pieces = list(place.cut(size))
    assert [at for piece in pieces for at in indices(piece)] == indices(place)
    assert all(piece.size <= max(size, place.row_bytes) for piece in pieces)
    assert place.rows > 1 or all(piece.size <= size for piece in pieces)


def test_nothing_lies_nowhere() -> None:
    assert range_of(0, (4, 4), 2, ((0, 4), (2, 2))) is None


@given(
    st.sampled_from([SEND, TAKE]),
    st.lists(st.builds(lambda at, row, rows: FileRange(at, row, row + 3, rows),
                       st.integers(0, 1 << 50), st.integers(1, 1 << 40), st.integers(1, 1000))),
    st.integers(1, 7),
)  # fmt: skip
def test_an_order_is_read_as_it_was_written(kind: Any, ranges: list[FileRange], step: int) -> None:
    order = Order(kind, [*ranges, passed(16)])
    data, reader = order.encode(), OrderReader()
    found = None
    while data:
        assert found is None
        size = min(step, reader.missing)
        found, data = reader.feed(data[:size]), data[size:]
    assert found == order


@pytest.mark.parametrize(
    "data",
    [b"X" + bytes(4), b"S" + b"\xff" * 4, Order(SEND, [FileRange(0, 0, 0, 1)]).encode(),
     Order(TAKE, [FileRange(0, 8, 4, 2)]).encode()],
)  # fmt: skip
def test_what_is_no_order_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="an order"):
        read(data)


def read(data: bytes) -> None:
    reader = OrderReader()
    while data:
        size = reader.missing
        reader.feed(data[:size])
        data = data[size:]
