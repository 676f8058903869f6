"""One request that a server connection handed over, and its answer."""

from collections.abc import Callable
from http import HTTPStatus
from typing import Protocol

_REASONS = {status.value: status.phrase.encode() for status in HTTPStatus}


class Answering(Protocol):
    """The connection that an answer goes out on."""

    def send(self, data: bytes) -> None: ...

    def finished(self, *, close: bool) -> None: ...

    def abort(self) -> None: ...


class Exchange:
    """One request and its answer.

    ``path`` is the target's path and query; of headers that came twice the first counts.
    ``on_disconnect`` is called if the client goes before the answer is complete; ``on_pause`` with
    ``True`` when the client reads too slowly, with ``False`` when it has caught up.
    """

    __slots__ = (
        "_connection",
        "body",
        "done",
        "headers",
        "http_1_0",
        "keep_alive",
        "method",
        "on_disconnect",
        "on_pause",
        "path",
        "started",
    )

    def __init__(self, connection: Answering) -> None:
        self._connection = connection
        self.method = b""
        self.path = b""
        self.headers: dict[bytes, bytes] = {}
        self.body = b""
        self.keep_alive = True
        self.http_1_0 = False
        self.started = False
        self.done = False
        self.on_disconnect: Callable[[], None] | None = None
        self.on_pause: Callable[[bool], None] | None = None

    def respond(
        self,
        status: int,
        body: bytes,
        *,
        content_type: bytes = b"application/json",
        headers: tuple[tuple[bytes, bytes], ...] = (),
        close: bool = False,
    ) -> None:
        """A whole answer at once."""
        fields = (
            (b"content-type", content_type),
            (b"content-length", b"%d" % len(body)),
            *headers,
        )
        self.start(status, fields, close=close)
        self.write(b"" if self.method == b"HEAD" else body)
        self.finish()

    def start(
        self, status: int, headers: tuple[tuple[bytes, bytes], ...], *, close: bool = False
    ) -> None:
        """Status line and headers; the body follows in ``write``, framed as the headers say."""
        if self.done:
            return
        self.started = True
        self.keep_alive = self.keep_alive and not close
        lines = [b"HTTP/1.1 %d %b\r\n" % (status, _REASONS.get(status, b"Unknown"))]
        lines += [b"%b: %b\r\n" % field for field in headers]
        if not self.keep_alive:
            lines.append(b"connection: close\r\n")
        elif self.http_1_0:
            lines.append(b"connection: keep-alive\r\n")
        lines.append(b"\r\n")
        self._connection.send(b"".join(lines))

    def write(self, data: bytes) -> None:
        """Raw bytes of the answer's body."""
        if not self.done:
            self._connection.send(data)

    def finish(self, *, close: bool = False) -> None:
        """The answer is complete."""
        if not self.done:
            self.done = True
            self._connection.finished(close=close or not self.keep_alive)

    def abort(self) -> None:
        """Break the connection off: the answer cannot be completed."""
        if not self.done:
            self.done = True
            self._connection.abort()
