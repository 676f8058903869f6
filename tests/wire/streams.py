"""Raw byte streams as clients, proxies and attackers send them, and what a server makes of them.

Each is a name and the bytes. ``heard`` plays them to a server's protocol over a transport in
memory, so that reads cut anywhere cost nothing and nothing is waited for.
"""

import asyncio
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

HOST = b"host: a\r\n"
GET = b"GET /x HTTP/1.1\r\nhost: a\r\n\r\n"
NEXT = b"GET /next HTTP/1.1\r\nhost: a\r\n\r\n"


def get(fields: bytes = b"", *, target: bytes = b"/x", version: bytes = b"1.1") -> bytes:
    return b"GET %b HTTP/%b\r\n" % (target, version) + HOST + fields + b"\r\n"


def post(fields: bytes, body: bytes, *, version: bytes = b"1.1", method: bytes = b"POST") -> bytes:
    return b"%b /x HTTP/%b\r\n" % (method, version) + HOST + fields + b"\r\n" + body


def chunked(body: bytes, fields: bytes = b"", *, version: bytes = b"1.1") -> bytes:
    return post(b"transfer-encoding: chunked\r\n" + fields, body, version=version)


_H2C = (
    b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAARAAAAA\r\n"
)
_WEBSOCKET = (
    b"connection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n"
    b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)

PLAIN: dict[str, bytes] = {
    "a get": GET,
    "two gets": GET + NEXT,
    "many gets": GET * 8,
    "a post": post(b"content-length: 3\r\n", b"abc"),
    "a post, then a get": post(b"content-length: 3\r\n", b"abc") + NEXT,
    "an empty post": post(b"content-length: 0\r\n", b"") + NEXT,
    "a post without a length": post(b"", b"") + NEXT,
    "a get with a body": post(b"content-length: 3\r\n", b"abc", method=b"GET") + NEXT,
    "head": b"HEAD /x HTTP/1.1\r\nhost: a\r\n\r\n" + NEXT,
    "put, patch and delete": b"".join(
        post(b"content-length: 1\r\n", b"a", method=method)
        for method in (b"PUT", b"PATCH", b"DELETE")
    ),
    "options of a path": b"OPTIONS /x HTTP/1.1\r\nhost: a\r\n\r\n",
    "options of the server": b"OPTIONS * HTTP/1.1\r\nhost: a\r\n\r\n",
    "trace": b"TRACE /x HTTP/1.1\r\nhost: a\r\n\r\n",
    "a query": get(target=b"/x?a=%20b&c"),
    "an empty query": get(target=b"/x?"),
    "a body that comes short": post(b"content-length: 5\r\n", b"abc"),
    "a head that comes short": b"GET /x HTTP/1.1\r\nho",
    "nothing": b"",
    "an empty line first": b"\r\n" + GET,
    "empty lines between": GET + b"\r\n\r\n" + NEXT,
    "close": get(b"connection: close\r\n"),
    "close, then another": get(b"connection: close\r\n") + NEXT,
    "close in capitals": get(b"Connection: CLOSE\r\n") + NEXT,
    "close in a list": get(b"connection: te, close\r\n") + NEXT,
    "keep-alive": get(b"connection: keep-alive\r\n") + NEXT,
    "expect, body at once": post(b"expect: 100-continue\r\ncontent-length: 3\r\n", b"abc"),
    "expect, no body yet": post(b"expect: 100-continue\r\ncontent-length: 3\r\n", b""),
    "expect without a body": get(b"expect: 100-continue\r\n"),
    "expect something else": get(b"expect: 200-ok\r\n"),
    "expect behind another": GET + post(b"expect: 100-continue\r\ncontent-length: 3\r\n", b""),
    "expect of HTTP/1.0": post(
        b"expect: 100-continue\r\ncontent-length: 3\r\n", b"abc", version=b"1.0"
    ),
}

OLD: dict[str, bytes] = {
    "1.0": get(version=b"1.0"),
    "1.0 without a host": b"GET /x HTTP/1.0\r\n\r\n",
    "1.0, then another": get(version=b"1.0") + NEXT,
    "1.0 keep-alive": get(b"connection: keep-alive\r\n", version=b"1.0") + get(version=b"1.0"),
    "1.0 chunked": chunked(b"3\r\nabc\r\n0\r\n\r\n", version=b"1.0"),
    "1.0 post": post(b"content-length: 3\r\n", b"abc", version=b"1.0"),
    "0.9": b"GET /x\r\n",
    "1.2": get(version=b"1.2"),
    "2.0": get(version=b"2.0"),
    "1.10": get(version=b"1.10"),
    "no version": b"GET /x \r\nhost: a\r\n\r\n",
    "http in small letters": b"GET /x http/1.1\r\nhost: a\r\n\r\n",
    "the preface of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a TLS hello": b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03",
}

CHUNKS: dict[str, bytes] = {
    "one chunk": chunked(b"3\r\nabc\r\n0\r\n\r\n") + NEXT,
    "three chunks": chunked(b"1\r\na\r\n1\r\nb\r\n1\r\nc\r\n0\r\n\r\n") + NEXT,
    "no chunk": chunked(b"0\r\n\r\n") + NEXT,
    "size in capitals": chunked(b"A\r\n0123456789\r\n0\r\n\r\n"),
    "size with zeros": chunked(b"0003\r\nabc\r\n000\r\n\r\n"),
    "size with very many zeros": chunked(b"0" * 300 + b"3\r\nabc\r\n0\r\n\r\n"),
    "coding in capitals": post(b"Transfer-Encoding: CHUNKED\r\n", b"3\r\nabc\r\n0\r\n\r\n"),
    "an extension": chunked(b"3;a=b\r\nabc\r\n0;c\r\n\r\n") + NEXT,
    "a quoted extension": chunked(b'3;a="b c"\r\nabc\r\n0\r\n\r\n'),
    "a line end in a quoted extension": chunked(b'3;a="b\r\n"\r\nabc\r\n0\r\n\r\n'),
    "space after the size": chunked(b"3 \r\nabc\r\n0\r\n\r\n"),
    "space before the size": chunked(b" 3\r\nabc\r\n0\r\n\r\n"),
    "space before an extension": chunked(b"3 ;a\r\nabc\r\n0\r\n\r\n"),
    "a sign before the size": chunked(b"+3\r\nabc\r\n0\r\n\r\n"),
    "a size with 0x": chunked(b"0x3\r\nabc\r\n0\r\n\r\n"),
    "a size with an underscore": chunked(b"0_3\r\nabc\r\n0\r\n\r\n"),
    "no size": chunked(b"\r\nabc\r\n0\r\n\r\n"),
    "a size of 60 bits": chunked(b"fffffffffffffff\r\nabc"),
    "a size of 68 bits": chunked(b"fffffffffffffffff\r\nabc"),
    "a size of 300 digits": chunked(b"f" * 300 + b"\r\nabc"),
    "a chunk that is longer": chunked(b"3\r\nabcd\r\n0\r\n\r\n"),
    "a chunk that is shorter": chunked(b"4\r\nabc\r\n0\r\n\r\n") + NEXT,
    "bare LF after a size": chunked(b"3\nabc\r\n0\r\n\r\n"),
    "bare LF after a chunk": chunked(b"3\r\nabc\n0\r\n\r\n"),
    "bare LF at the end": chunked(b"3\r\nabc\r\n0\r\n\n"),
    "bare CR after a size": chunked(b"3\rabc\r\n0\r\n\r\n"),
    "a trailer": chunked(b"3\r\nabc\r\n0\r\nx-sum: 1\r\n\r\n") + NEXT,
    "a trailer that names a host": chunked(b"3\r\nabc\r\n0\r\nhost: b\r\n\r\n") + NEXT,
    "a trailer that is none": chunked(b"3\r\nabc\r\n0\r\nx sum\r\n\r\n"),
    "a trailer with a length": chunked(b"3\r\nabc\r\n0\r\ncontent-length: 9\r\n\r\n"),
    "a large chunk": chunked(b"%x\r\n%b\r\n0\r\n\r\n" % (70_000, b"a" * 70_000)),
    "a large body": post(b"content-length: 70000\r\n", b"a" * 70_000) + NEXT,
}

AMBIGUOUS: dict[str, bytes] = {
    "length, then coding": post(
        b"content-length: 4\r\ntransfer-encoding: chunked\r\n", b"0\r\n\r\n"
    ),
    "coding, then length": post(
        b"transfer-encoding: chunked\r\ncontent-length: 4\r\n", b"0\r\n\r\n"
    ),
    "two equal lengths": post(b"content-length: 3\r\ncontent-length: 3\r\n", b"abc"),
    "two lengths": post(b"content-length: 3\r\ncontent-length: 5\r\n", b"abcde"),
    "a list of equal lengths": post(b"content-length: 3, 3\r\n", b"abc"),
    "a list of lengths": post(b"content-length: 3, 5\r\n", b"abcde"),
    "a signed length": post(b"content-length: +3\r\n", b"abc"),
    "a negative length": post(b"content-length: -3\r\n", b"abc"),
    "a length in hex": post(b"content-length: 0x3\r\n", b"abc"),
    "a length with an underscore": post(b"content-length: 1_0\r\n", b"0123456789"),
    "a length with a dot": post(b"content-length: 3.0\r\n", b"abc"),
    "an empty length": post(b"content-length:\r\n", b""),
    "a length with zeros": post(b"content-length: 0003\r\n", b"abc") + NEXT,
    "a length with spaces": post(b"content-length: \t 3 \t \r\n", b"abc") + NEXT,
    "a length of 80 bits": post(b"content-length: 999999999999999999999999\r\n", b"abc"),
    "a length of 300 digits": post(b"content-length: " + b"9" * 300 + b"\r\n", b"abc"),
    "space before the colon": post(b"content-length : 3\r\n", b"abc"),
    "space before the name": post(b"a: b\r\n content-length: 3\r\n", b"abc"),
    "space before the first name": b"GET /x HTTP/1.1\r\n host: a\r\n\r\n",
    "coding with space before the colon": post(b"transfer-encoding : chunked\r\n", b"0\r\n\r\n"),
    "coding twice": post(
        b"transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n", b"0\r\n\r\n"
    ),
    "coding twice in a list": post(b"transfer-encoding: chunked, chunked\r\n", b"0\r\n\r\n"),
    "gzip, chunked": post(b"transfer-encoding: gzip, chunked\r\n", b"0\r\n\r\n"),
    "chunked, gzip": post(b"transfer-encoding: chunked, gzip\r\n", b"0\r\n\r\n"),
    "identity": post(b"transfer-encoding: identity\r\n", b""),
    "identity, then chunked": post(
        b"transfer-encoding: identity\r\ntransfer-encoding: chunked\r\n", b"0\r\n\r\n"
    ),
    "a coding that looks like it": post(b"transfer-encoding: xchunked\r\n", b"0\r\n\r\n"),
    "a quoted coding": post(b'transfer-encoding: "chunked"\r\n', b"0\r\n\r\n"),
    "a coding with a parameter": post(b"transfer-encoding: chunked;q=1\r\n", b"0\r\n\r\n"),
    "an empty coding": post(b"transfer-encoding:\r\n", b""),
    "a coding with a vertical tab": post(b"transfer-encoding: \x0bchunked\r\n", b"0\r\n\r\n"),
    "bare LF everywhere": b"GET /x HTTP/1.1\nhost: a\n\n",
    "bare LF after a field": b"GET /x HTTP/1.1\r\nhost: a\na: b\r\n\r\n",
    "bare LF at the end of the head": b"GET /x HTTP/1.1\r\nhost: a\r\n\n",
    "bare CR in a value": get(b"a: b\rc\r\n"),
    "bare CR at line ends": b"GET /x HTTP/1.1\rhost: a\r\r",
    "CR CR LF": b"GET /x HTTP/1.1\r\r\nhost: a\r\n\r\n",
    "NUL in a value": get(b"a: b\0c\r\n"),
    "a control character in a value": get(b"a: b\x01c\r\n"),
    "a folded field": get(b"a: b\r\n c\r\n"),
    "a folded field at the end": get(b"a: b\r\n \r\n"),
    "no colon": get(b"abc\r\n"),
    "no name": get(b": b\r\n"),
    "a space in a name": get(b"a b: c\r\n"),
    "a name of other letters": get("ä: b\r\n".encode()),
    "two hosts": b"GET /x HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n",
    "two equal hosts": b"GET /x HTTP/1.1\r\nhost: a\r\nhost: a\r\n\r\n",
    "no host": b"GET /x HTTP/1.1\r\n\r\n",
    "an empty host": b"GET /x HTTP/1.1\r\nhost:\r\n\r\n",
    "a host that is none": b"GET /x HTTP/1.1\r\nhost: a/b\r\n\r\n",
    "a host with a user": b"GET /x HTTP/1.1\r\nhost: b@a\r\n\r\n",
    "an IPv6 host": b"GET /x HTTP/1.1\r\nhost: [::1]:80\r\n\r\n",
    "two authorizations": get(b"authorization: Bearer a\r\nauthorization: Bearer b\r\n"),
    "two content types": get(b"content-type: text/plain\r\ncontent-type: application/json\r\n"),
    "two of another field": get(b"a: b\r\na: c\r\n"),
    "garbage behind a request": GET + b"\0\0\0\0\r\n\r\n",
    "garbage behind a body": post(b"content-length: 3\r\n", b"abcdef\r\n\r\n"),
}

TARGETS: dict[str, bytes] = {
    "absolute": get(target=b"http://a/x"),
    "absolute with a port": get(target=b"http://a:80/x?q"),
    "absolute of https": get(target=b"https://a/x"),
    "absolute in capitals": get(target=b"HTTP://A/x"),
    "absolute, another host": get(target=b"http://b/x"),
    "absolute without a path": get(target=b"http://a"),
    "absolute, query only": get(target=b"http://a?q"),
    "absolute without a host": get(target=b"http:///x"),
    "absolute with a user": get(target=b"http://u@a/x"),
    "absolute of ftp": get(target=b"ftp://a/x"),
    "authority": b"CONNECT a:80 HTTP/1.1\r\nhost: a:80\r\n\r\n",
    "get of a star": get(target=b"*"),
    "no slash": get(target=b"x"),
    "two slashes": get(target=b"//x"),
    "dots": get(target=b"/a/../x"),
    "an escaped letter": get(target=b"/%78"),
    "escaped, small": get(target=b"/a%7eb"),
    "an escaped slash": get(target=b"/a%2Fx"),
    "an escaped space": get(target=b"/a%20x"),
    "an escaped letter that is none": get(target=b"/a%zzx"),
    "an escape cut short": get(target=b"/a%7"),
    "an escaped line end": get(target=b"/x%0d%0aa:%20b"),
    "an escaped NUL": get(target=b"/x%00"),
    "other letters": get(target="/ä".encode()),
    "a fragment": get(target=b"/x#y"),
    "a space": get(target=b"/x y"),
    "a tab": get(target=b"/x\ty"),
    "two spaces": b"GET  /x  HTTP/1.1\r\nhost: a\r\n\r\n",
    "a tab for a space": b"GET\t/x HTTP/1.1\r\nhost: a\r\n\r\n",
    "a space at the end": b"GET /x HTTP/1.1 \r\nhost: a\r\n\r\n",
    "a space at the beginning": b" GET /x HTTP/1.1\r\nhost: a\r\n\r\n",
    "a quotation mark": get(target=b'/x"y'),
    "a long target": get(target=b"/" + b"x" * 20_000),
    "a target that is too long": get(target=b"/" + b"x" * 40_000),
    "a small method": b"get /x HTTP/1.1\r\nhost: a\r\n\r\n",
    "an unknown method": b"FOO /x HTTP/1.1\r\nhost: a\r\n\r\n",
    "a method that is none": b"G@T /x HTTP/1.1\r\nhost: a\r\n\r\n",
    "many fields": get(b"".join(b"f%d: v\r\n" % index for index in range(900))),
    "too many fields": get(b"".join(b"f%d: v\r\n" % index for index in range(9000))),
    "a long value": get(b"a: " + b"b" * 20_000 + b"\r\n"),
    "a value that is too long": get(b"a: " + b"b" * 40_000 + b"\r\n"),
    "an empty value": get(b"a:\r\nb: c\r\n"),
    "a value of other bytes": get(b"a: \xe4\xff\r\n"),
}

UPGRADES: dict[str, bytes] = {
    "h2c get": get(_H2C) + NEXT,
    "h2c post": post(_H2C + b"content-length: 3\r\n", b"abc") + NEXT,
    "h2c post in chunks": chunked(b"3\r\nabc\r\n0\r\n\r\n", _H2C) + NEXT,
    "h2c and close": get(_H2C.replace(b"Upgrade, ", b"close, Upgrade, ")),
    "h2c of HTTP/1.0": get(_H2C, version=b"1.0"),
    "an upgrade nobody waits for": get(b"upgrade: h2c\r\n") + NEXT,
    "an upgrade to something else": get(b"connection: upgrade\r\nupgrade: TLS/1.0\r\n") + NEXT,
    "h2c post, ambiguous": post(
        _H2C + b"content-length: 3\r\ntransfer-encoding: chunked\r\n", b"0\r\n\r\n"
    ),
}

STREAMS: dict[str, bytes] = {**PLAIN, **OLD, **CHUNKS, **AMBIGUOUS, **TARGETS, **UPGRADES}


@dataclass
class Heard:
    """What the application was asked (method, path, body), the statuses told, and who closed."""

    asked: list[tuple[str, str, bytes]] = field(default_factory=list)
    told: list[int] = field(default_factory=list)
    closed: bool = False

    def __str__(self) -> str:
        told = " ".join(map(str, self.told)) or "silence"
        return told + (", closed" if self.closed else "")


class Memory(asyncio.Transport):
    """A transport that goes nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = bytearray()
        self.shut = False
        self.half_shut = False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        del name
        return default

    def write(self, data: Any) -> None:
        if not self.half_shut:
            self.sent += data

    def write_eof(self) -> None:
        self.half_shut = True

    def can_write_eof(self) -> bool:
        return True

    def is_closing(self) -> bool:
        return self.shut

    def close(self) -> None:
        self.shut = True

    def abort(self) -> None:
        self.shut = True

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...


_STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")
_TURNS = 40

Made = Callable[[Heard], asyncio.Protocol]


async def heard(make: Made, pieces: Sequence[bytes], *, turns: int = _TURNS) -> Heard:
    """What a server makes of these reads; ``turns`` of the event loop after the last."""
    found = Heard()
    protocol = make(found)
    transport = Memory()
    protocol.connection_made(transport)
    for piece in filter(None, pieces):
        if transport.shut:
            break
        protocol.data_received(piece)
    for _ in range(turns):
        await asyncio.sleep(0)
    found.told = [int(status) for status in _STATUS.findall(bytes(transport.sent))]
    found.closed = transport.shut or transport.half_shut
    protocol.connection_lost(None)
    for _ in range(3):
        await asyncio.sleep(0)
    return found
