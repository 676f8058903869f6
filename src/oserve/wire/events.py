"""Server-sent events, read by the WHATWG HTML standard (section 9.2.6).

Pure: pieces of bytes in, whole events out. Lines end in LF, CR or CRLF; a leading byte order mark,
comments and unknown fields are allowed. The reader does not interpret the data of an event.
"""

from typing import NamedTuple

_BOM = b"\xef\xbb\xbf"
_MAX_EVENT_BYTES = 64 * 1024 * 1024


class EventsError(ValueError):
    """A stream of events that cannot be read any further."""


class ServerSentEvent(NamedTuple):
    """One event, or comments alone.

    ``text``: its lines, each ended by LF, and the empty line at its end. ``data``: its data lines
    joined by LF; ``None`` if it has none: clients ignore such an event.
    """

    text: bytes
    data: bytes | None

    @property
    def kind(self) -> bytes:
        """The event's type: its last ``event`` field, empty if it has none."""
        if self.text.startswith(b"data: ") and self.text.count(b"\n") == 2:
            return b""
        fields = (line.partition(b":") for line in self.text.split(b"\n"))
        kinds = [value.removeprefix(b" ") for name, _, value in fields if name == b"event"]
        return kinds[-1] if kinds else b""


class EventReader:
    """Reads one stream. ``idle``: no part of an incomplete event is buffered."""

    __slots__ = ("_buffer", "_scanned", "_skip_lf", "_started")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._scanned = 0
        self._skip_lf = False
        self._started = False

    @property
    def idle(self) -> bool:
        return not self._buffer and not self._skip_lf and self._started

    def feed(self, payload: bytes) -> list[ServerSentEvent]:
        """Take bytes in; return the events that are complete now. Raises EventsError."""
        if self._skip_lf and payload:
            # The last piece ended in CR, which already ended the line.
            payload = payload.removeprefix(b"\n")
            self._skip_lf = False
        if b"\r" in payload:
            self._skip_lf = payload.endswith(b"\r")
            payload = payload.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        buffer = self._buffer
        buffer += payload
        if not self._started:
            if len(buffer) < len(_BOM) and _BOM.startswith(buffer):
                return []
            self._started = True
            if buffer.startswith(_BOM):
                del buffer[: len(_BOM)]
        return self._split()

    def _split(self) -> list[ServerSentEvent]:
        buffer = self._buffer
        events = []
        start, scan = 0, self._scanned
        while True:
            if buffer.startswith(b"\n", start):
                start += 1
                continue
            end = buffer.find(b"\n\n", max(start, scan))
            if end < 0:
                break
            events.append(_event(bytes(buffer[start : end + 2])))
            start = scan = end + 2
        del buffer[:start]
        if len(buffer) > _MAX_EVENT_BYTES:
            raise EventsError("an event is longer than 64 MiB")
        self._scanned = max(0, len(buffer) - 1)
        return events

    def end(self) -> ServerSentEvent | None:
        """The stream ended: return the last event if its empty line is missing.

        The standard drops it, but some servers forget that line.
        """
        if not self._buffer.strip(b"\n"):
            return None
        text = bytes(self._buffer.rstrip(b"\n")) + b"\n\n"
        self._buffer.clear()
        return _event(text)


def data_event(data: bytes) -> bytes:
    """An event with one line of data, in vLLM's format."""
    return b"data: %b\n\n" % data


def _event(text: bytes) -> ServerSentEvent:
    if text.startswith(b"data: ") and text.find(b"\n") == len(text) - 2:
        return ServerSentEvent(text, text[6:-2])
    lines = []
    for line in text.split(b"\n"):
        name, colon, value = line.partition(b":")
        if name == b"data":
            lines.append(value.removeprefix(b" ") if colon else b"")
    return ServerSentEvent(text, b"\n".join(lines) if lines else None)
