"""One request of a server connection, and its answer."""

from collections.abc import Callable
from http import HTTPStatus
from typing import Protocol

_STATUS_LINES = {
    status.value: b"HTTP/1.1 %d %b" % (status.value, status.phrase.encode())
    for status in HTTPStatus
}


class Answering(Protocol):
    """The connection that an answer is written to. ``peer``: the client's address, if known."""

    @property
    def peer(self) -> str: ...

    def send(self, data: bytes, /) -> None:
        """Write bytes of the answer."""

    def finished(self, *, close: bool) -> None:
        """The answer is complete; ``close``: the connection takes no other request."""

    def abort(self) -> None:
        """Break the connection off."""


class Exchange:
    """One request and its answer.

    ``path`` is the path and query of the target; of a repeated header the first value counts.
    ``on_disconnect`` is called if the client disconnects before the answer is complete;
    ``on_pause`` is called with ``True`` when the client reads too slowly and with ``False`` when it
    has caught up. Both are dropped once the answer is complete, which also breaks the reference
    cycle between an exchange and its handler. ``added``: headers of whatever answer it gets.
    """

    __slots__ = (
        "_connection",
        "added",
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
        self.added: tuple[tuple[bytes, bytes], ...] = ()
        self.headers: dict[bytes, bytes] = {}
        self.body = b""
        self.keep_alive = True
        self.http_1_0 = False
        self.started = False
        self.done = False
        self.on_disconnect: Callable[[], None] | None = None
        self.on_pause: Callable[[bool], None] | None = None

    @property
    def peer(self) -> str:
        """The client's address; empty if unknown."""
        return self._connection.peer

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
        self.start(status, fields, b"" if self.method == b"HEAD" else body, close=close)
        self.finish()

    def start(
        self,
        status: int,
        headers: tuple[tuple[bytes, bytes], ...],
        body: bytes = b"",
        *,
        close: bool = False,
    ) -> None:
        """Send status line, headers and the first bytes of the ``body`` in one write.

        The rest follows in ``write``; the caller frames the body as the headers say.
        """
        if self.done:
            return
        self.started = True
        self.keep_alive = self.keep_alive and not close
        lines = [_STATUS_LINES.get(status) or b"HTTP/1.1 %d Unknown" % status]
        lines += map(b": ".join, headers)
        lines += map(b": ".join, self.added)
        if not self.keep_alive:
            lines.append(b"connection: close")
        elif self.http_1_0:
            lines.append(b"connection: keep-alive")
        lines += (b"", body)
        self._connection.send(b"\r\n".join(lines))

    def write(self, data: bytes) -> None:
        """Send more bytes of the body."""
        if not self.done:
            self._connection.send(data)

    def finish(self, *, close: bool = False) -> None:
        """The answer is complete."""
        if not self.done:
            self.done = True
            self.on_disconnect = self.on_pause = None
            self._connection.finished(close=close or not self.keep_alive)

    def abort(self) -> None:
        """Break the connection off: the answer cannot be completed."""
        if not self.done:
            self.done = True
            self.on_disconnect = self.on_pause = None
            self._connection.abort()
