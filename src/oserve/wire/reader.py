"""Reads the requests on one client connection and hands over each when it is whole.

A request whose end or target two readers could see differently is refused. A request that arrives
in one piece behind a head that is known already does without the parser.
"""

from typing import Protocol

import httptools

from oserve.wire.exchange import Answering, Exchange
from oserve.wire.head import fault_of_head, origin_form
from oserve.wire.known import KnownHeads, RequestHead

_MAX_HEADER_BYTES = 32 * 1024
_TOO_LARGE = "request headers are larger than 32 KiB"
# A second one of these fields could be read by another server instead of the first.
_SINGLE = {b"host", b"authorization", b"content-type"}
_UPGRADE = {b"upgrade", b"http2-settings"}
_HEAD_END = b"\r\n\r\n"


class RefusedError(Exception):
    """A request that is refused: the status and the message of the answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class _EndedError(Exception):
    """Stops the parser: the connection takes no more requests."""


class Requests(Answering, Protocol):
    """The connection that requests are read for."""

    def request_begun(self) -> None:
        """The first byte of a request arrived."""

    def continue_wanted(self) -> None:
        """The client waits for 100 Continue before it sends the body."""

    def take(self, request: Exchange) -> None:
        """A request is whole."""


class RequestReader:
    """Parser callbacks of one connection.

    ``reading``: part of a request has arrived. ``ended``: no more requests are taken.
    ``continue_due``: the client has not sent the body yet and waits to be asked for it.
    """

    def __init__(self, requests: Requests, known: KnownHeads, max_body_bytes: int) -> None:
        self._requests = requests
        self._known = known
        self._max_body_bytes = max_body_bytes
        self._parser = httptools.HttpRequestParser(self)
        self._request: Exchange | None = None
        # The bytes of the head that is being parsed, where they came in one piece.
        self._raw_head = b""
        self._fields: list[tuple[bytes, bytes]] = []
        self._body: bytes | bytearray = b""
        # Bytes since the last that belonged to a body.
        self._header_bytes = self._field_bytes = 0
        self._in_head = True
        self._upgrading = False
        self._url = b""
        self.continue_due = False
        self.ended = False

    @property
    def reading(self) -> bool:
        return self._request is not None

    def feed(self, data: bytes) -> None:
        """Take bytes in. Raises RefusedError, after which it must not be fed again."""
        raw_head = b""
        if self._request is None:
            end = data.find(_HEAD_END) + 4
            raw_head = data[:end] if end >= len(_HEAD_END) else b""
            head = self._known.get(raw_head)
            if head is not None and len(data) - end == head.length_bytes:
                self._take_known(head, data[end:])
                return
        self._raw_head = raw_head
        self._header_bytes += len(data)
        try:
            self._parse(data)
        except httptools.HttpParserCallbackError as error:
            reason = error.__context__
            if isinstance(reason, RefusedError):
                raise reason from None
            if not isinstance(reason, _EndedError):
                raise
        except httptools.HttpParserError as error:
            raise RefusedError(400, f"malformed HTTP request: {error}") from None
        else:
            if self._header_bytes > _MAX_HEADER_BYTES:
                raise RefusedError(431, _TOO_LARGE)

    def _take_known(self, head: RequestHead, body: bytes) -> None:
        self._header_bytes = 0
        request = Exchange(self._requests)
        request.method = head.method
        request.path = head.path
        request.headers = dict(head.headers)
        request.body = body
        self._requests.take(request)

    def _parse(self, data: bytes) -> None:
        while True:
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                # Ignoring an upgrade is allowed (RFC 9110, 7.8), but the parser stops at the head
                # and takes the body for the other protocol's: it is fed a head without the field.
                data = self._head_without_upgrade() + data[upgrade.args[0] :]
                self._parser = httptools.HttpRequestParser(self)
            else:
                return

    def _head_without_upgrade(self) -> bytes:
        request = self._request
        if request is None:
            raise RefusedError(400, "malformed HTTP request: an upgrade without a request")
        version = b"1.0" if request.http_1_0 else b"1.1"
        lines = [b"%b %b HTTP/%b\r\n" % (request.method, self._url, version)]
        lines += [b"%b: %b\r\n" % item for item in self._fields if item[0] not in _UPGRADE]
        return b"".join((*lines, b"\r\n"))

    # -- httptools callbacks --------------------------------------------------------------------
    def on_message_begin(self) -> None:
        if self.ended:
            raise _EndedError
        self._request = Exchange(self._requests)
        self._url = b""
        self._fields = []
        self._body = b""
        self._in_head = True
        self._field_bytes = 0
        self._upgrading = self.continue_due = False
        self._requests.request_begun()

    def on_url(self, url: bytes) -> None:
        self._url += url
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + 4)
        # Trailer fields of a chunked body must not change what the head said.
        if self._in_head:
            self._fields.append((name.lower(), value.strip(b" \t")))

    def _count(self, size: int) -> None:
        self._field_bytes += size
        if self._field_bytes > _MAX_HEADER_BYTES:
            raise RefusedError(431, _TOO_LARGE)

    def on_headers_complete(self) -> None:
        request = self._request
        if request is None:
            return
        raw_head, self._raw_head = self._raw_head, b""
        self._in_head = False
        self._header_bytes = self._field_bytes = 0
        self._check_head(request)
        if self._parser.should_upgrade():
            self._upgrading = True
            return
        length = request.headers.get(b"content-length", b"0")
        if int(length) > self._max_body_bytes:
            self._refuse_body()
        has_body = length != b"0" or b"transfer-encoding" in request.headers
        expects = request.headers.get(b"expect", b"").lower() == b"100-continue"
        if expects and has_body and not request.http_1_0:
            self.continue_due = True
            self._requests.continue_wanted()
        elif raw_head and request.keep_alive and not request.http_1_0:
            self._known.learn(
                raw_head,
                RequestHead(request.method, request.path, dict(request.headers), int(length)),
            )

    def _check_head(self, request: Exchange) -> None:
        request.method = self._parser.get_method()
        request.keep_alive = self._parser.should_keep_alive()
        version = self._parser.get_http_version()
        request.http_1_0 = version == "1.0"
        headers = request.headers
        for name, value in self._fields:
            if name in headers:
                if name in _SINGLE:
                    raise RefusedError(400, f"more than one {name.decode('latin-1')} field")
            else:
                headers[name] = value
        request.path = origin_form(self._url, request.method)
        wrong = fault_of_head(request.method, request.path, version, headers)
        if wrong is not None:
            raise RefusedError(*wrong)

    def on_body(self, body: bytes) -> None:
        self._header_bytes = 0
        self.continue_due = False
        if len(self._body) + len(body) > self._max_body_bytes:
            self._refuse_body()
        if not self._body:
            self._body = body
            return
        if isinstance(self._body, bytes):
            self._body = bytearray(self._body)
        self._body += body

    def _refuse_body(self) -> None:
        limit = self._max_body_bytes
        raise RefusedError(413, f"request body is larger than the limit of {limit} bytes")

    def on_message_complete(self) -> None:
        request = self._request
        if self._upgrading or request is None:
            return
        self._request = None
        self._in_head = True
        self._header_bytes = 0
        request.body, self._body = bytes(self._body), b""
        # What follows a request that closes the connection is no request (RFC 9112, 9.6).
        self.ended = not request.keep_alive
        self._requests.take(request)

    def forget(self) -> None:
        """Drop what has been read of a request, and take no more."""
        self._request, self._body = None, b""
        self.ended = True
