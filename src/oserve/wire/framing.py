"""Finds the end of an HTTP/1.1 message body without reading its content (RFC 9112, 6-7)."""

import re

LAST_CHUNK = b"0\r\n\r\n"
_MAX_SIZE_LINE = 256


class FramingError(ValueError):
    """The peer broke the framing of its message."""


def chunk(payload: bytes) -> bytes:
    """One chunk of the chunked transfer coding."""
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def dechunk(data: bytes) -> bytes:
    """Payload of a run of whole chunks."""
    parts = []
    position = 0
    while position < len(data):
        line_end = data.find(b"\r\n", position)
        size = _size(data[position:line_end]) if line_end >= 0 else 0
        if size == 0:
            break
        parts.append(data[line_end + 2 : line_end + 2 + size])
        position = line_end + 4 + size
    return b"".join(parts)


class Dechunker:
    """Decodes the chunked transfer coding, however the bytes are cut up.

    ``idle``: the bytes so far ended with a whole chunk. No payload follows the last chunk.
    """

    __slots__ = ("_ended", "_left", "_line")

    def __init__(self) -> None:
        self._left = 0
        self._line = b""
        self._ended = False

    @property
    def idle(self) -> bool:
        return self._left == 0 and not self._line and not self._ended

    def feed(self, data: bytes) -> bytes:
        """The payload in these bytes. Raises FramingError."""
        parts = []
        position, size = 0, len(data)
        while position < size and not self._ended:
            if self._left:
                # The line end after a chunk is counted with it and is no payload.
                step = min(self._left, size - position)
                parts.append(data[position : position + min(step, max(0, self._left - 2))])
                self._left -= step
                position += step
                continue
            line_end = data.find(b"\n", position)
            if line_end < 0:
                self._line += data[position:]
                if len(self._line) > _MAX_SIZE_LINE:
                    raise FramingError("chunk header too long")
                break
            line, self._line = self._line + data[position:line_end], b""
            position = line_end + 1
            length = _size(line.removesuffix(b"\r"))
            self._ended = length == 0
            self._left = length + 2 if length else 0
        return b"".join(parts)


class Framing:
    """Finds the end of one body; ``length`` is its Content-Length, ``None`` for a chunked one."""

    __slots__ = ("_in_trailer", "_left", "_line", "chunked", "complete")

    def __init__(self, length: int | None) -> None:
        self.chunked = length is None
        self.complete = length == 0
        self._left = length or 0
        self._line = b""
        self._in_trailer = False

    def feed(self, data: bytes) -> int:
        """Take bytes in; return how many belong to this body. Set ``complete`` at its end."""
        if not self.chunked:
            used = min(self._left, len(data))
            self._left -= used
            self.complete = self._left == 0
            return used
        size = len(data)
        if self._left == 0 and not self._line and not self._in_trailer:
            # By far the most frequent case: one whole chunk of a known size.
            line_end = data.find(b"\r\n", 0, 12)
            length = _known_sizes.get(data[:line_end], 0) if line_end > 0 else 0
            if length and line_end + length + 4 == size:
                return size
        position = 0
        while position < size:
            if self._left:
                step = min(self._left, size - position)
                self._left -= step
                position += step
                continue
            line_end = data.find(b"\r\n", position)
            if self._line or line_end < 0:
                position = self._feed_line(data, position)
            elif self._in_trailer:
                self._end_trailer(data[position:line_end])
                position = line_end + 2
            else:
                self._begin(data[position:line_end])
                position = line_end + 2
            if self.complete:
                return position
        return position

    def _feed_line(self, data: bytes, position: int) -> int:
        """Take in a size or trailer line that arrives in pieces."""
        line = self._line + data[position:]
        line_end = line.find(b"\r\n")
        if line_end < 0:
            if len(line) > _MAX_SIZE_LINE:
                raise FramingError("chunk header too long")
            self._line = line
            return len(data)
        used = line_end + 2 - len(self._line)
        self._line = b""
        if self._in_trailer:
            self._end_trailer(line[:line_end])
        else:
            self._begin(line[:line_end])
        return position + used

    def _begin(self, line: bytes) -> None:
        length = _known_sizes.get(line, -1)
        if length < 0:
            length = _size(line)
        if length == 0:
            self._in_trailer = True
        else:
            self._left = length + 2

    def _end_trailer(self, line: bytes) -> None:
        self.complete = not line


# Most chunks of a stream have one of a few sizes.
_known_sizes: dict[bytes, int] = {}
_MAX_KNOWN = 4096
_HEX = re.compile(rb"[0-9A-Fa-f]{1,15}")


def _size(line: bytes) -> int:
    digits = line.partition(b";")[0].strip()
    # Stricter than int(), whose signs, underscores and prefixes could let two parsers disagree.
    if len(line) > _MAX_SIZE_LINE or not _HEX.fullmatch(digits):
        raise FramingError(f"bad chunk header {line[:32]!r}")
    length = int(digits, 16)
    if len(_known_sizes) < _MAX_KNOWN:
        _known_sizes[line] = length
    return length
