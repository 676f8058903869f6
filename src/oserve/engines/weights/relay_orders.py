"""What a rank has its node's hatch do: send bytes that lie in a file, or put those that come there.

A rank's weights lie in a file without a name (``memory.WeightMemory``). Its hatch maps that file,
encrypts out of it and decrypts into it, so that no byte passes through the rank, whose interpreter
is serving, or through a socket between the two. An order stands between the bytes of the stream: a
byte that carries the file's descriptor, then the order's head and its ranges.

Bytes that come are placed in the order's sequence; those of a range at ``PASS`` go to the rank.
"""

import math
import struct
from collections.abc import Iterator, Sequence
from typing import Final, Literal, NamedTuple

SEND: Final = b"S"
TAKE: Final = b"T"
PASS: Final = (1 << 64) - 1
"""As the offset of a range: the bytes go to the rank."""

# Kind, and the number of ranges that follow.
HEAD: Final = struct.Struct("!cI")
_RANGE = struct.Struct("!QQQQ")
MAX_RANGES: Final = 1 << 20


class FileRange(NamedTuple):
    """``rows`` rows of ``row_bytes``, the first at ``offset``, each ``stride`` after the last."""

    offset: int
    row_bytes: int
    stride: int
    rows: int

    @property
    def size(self) -> int:
        return self.row_bytes * self.rows

    @property
    def end(self) -> int:
        """The first byte behind it, in the file."""
        return self.offset + self.stride * (self.rows - 1) + self.row_bytes

    def cut(self, size: int) -> Iterator["FileRange"]:
        """The same in pieces of at most ``size`` bytes, or of one row if that is longer."""
        if self.rows == 1:
            for start in range(0, self.row_bytes, size):
                length = min(size, self.row_bytes - start)
                yield FileRange(self.offset + start, length, length, 1)
            return
        step = max(1, size // self.row_bytes)
        for row in range(0, self.rows, step):
            rows = min(step, self.rows - row)
            yield self._replace(offset=self.offset + row * self.stride, rows=rows)


def passed(size: int) -> FileRange:
    """A range of bytes that go to the rank."""
    return FileRange(PASS, size, size, 1)


class Order(NamedTuple):
    """``SEND`` these ranges of the file, or ``TAKE`` what comes into them."""

    kind: Literal[b"S", b"T"]
    ranges: Sequence[FileRange]

    def encode(self) -> bytes:
        """As it follows the descriptor. Raises ValueError if there are too many ranges."""
        if len(self.ranges) > MAX_RANGES:
            raise ValueError(f"{len(self.ranges)} ranges are too many for one order")
        return HEAD.pack(self.kind, len(self.ranges)) + b"".join(
            _RANGE.pack(*one) for one in self.ranges
        )


class OrderReader:
    """Reads one order from bytes as they come."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._kind = b""
        self.missing = HEAD.size

    def feed(self, data: bytes | memoryview) -> Order | None:
        """Take at most ``missing`` bytes; the order once it is whole. Raises ValueError."""
        self._data += data
        self.missing -= len(data)
        if self.missing:
            return None
        if not self._kind:
            self._kind, count = HEAD.unpack(self._data)
            if self._kind not in {SEND, TAKE} or count > MAX_RANGES:
                raise ValueError("an order cannot be read")
            self._data.clear()
            self.missing = count * _RANGE.size
            if self.missing:
                return None
        ranges = [FileRange(*one) for one in _RANGE.iter_unpack(self._data)]
        for one in ranges:
            if not one.size or one.row_bytes > one.stride:
                raise ValueError("an order has a range of no bytes, or one that overlaps itself")
        return Order(SEND if self._kind == SEND else TAKE, ranges)


def range_of(
    offset: int, shape: Sequence[int], item_bytes: int, box: Sequence[tuple[int, int]]
) -> FileRange | None:
    """Where a box of a tensor lies, whose elements begin at ``offset`` in the file.

    ``None`` if its rows are not at equal distances, or it is empty.
    """
    extents = [stop - start for start, stop in box]
    if not all(extents):
        return None
    strides = [item_bytes * math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    start = offset + sum(low * stride for (low, _), stride in zip(box, strides, strict=True))
    cut = [dim for dim, extent in enumerate(extents) if extent != shape[dim]]
    # Behind the last dimension that is cut all bytes of a row follow each other.
    last = cut[-1] if cut else 0
    if any(0 < dim < last for dim in cut):
        return None
    row_bytes = math.prod(extents[last:]) * item_bytes
    rows = math.prod(extents[:last])
    if rows == 1:
        return FileRange(start, row_bytes, row_bytes, 1)
    return FileRange(start, row_bytes, strides[last - 1], rows)
