"""Connections through the hatch of another node to a Unix socket in its private folder.

The hatch is the node's one TLS port. Its certificate is its own, and the client accepts no other.
Inside TLS the hatch speaks first, with a line that no connection before had::

    hatch   oserve-hatch 1 NONCE
    client  HMAC-SHA256(token, NONCE NAME) NAME
    hatch   ok                                      or: no REASON

A byte ``B`` before TLS asks for the process of the hatch that relays weights, and for no more than
that: the greeting is the same.
From then on bytes go both ways between the client and the socket NAME. Whoever does not know the
token is cut off without a word. An end of either side ends both, once all bytes before it are
through: TLS in asyncio has no half-closed connections.
"""

import asyncio
import functools
import hashlib
import hmac
import os
import re
import socket
import ssl
from collections.abc import Callable
from typing import Final, cast

from oserve.core import HatchAddress
from oserve.wire.tls import TlsLayer

ANSWER_LIMIT_S: Final = 5.0
"""The time that either side has from the first byte to the end of the greeting."""

MAX_LINE_BYTES: Final = 512
"""The longest line of the greeting."""

BULK_BYTE: Final = b"B"
"""Before TLS; no TLS connection begins with it."""

KEEPER_NAME: Final = "keeper.sock"
ECHO_NAME: Final = "echo"
CONTROL_NAME: Final = "hatch-control"
HUB_SOCKET: Final = "hub.sock"
"""In the folder of a gateway process on another node: where the server's hub calls it."""

_GREETING = "oserve-hatch 1 "
_OK = b"ok"
_REFUSED = b"no "
_NONCE = re.compile(r"[0-9a-f]{32}")
# No name leads out of the folder: neither dots nor slashes begin one, and one slash parts two.
_FOLDER_NAMES = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}/(api|hub|w[0-9]{1,4})\.sock")
_BULK_NAMES = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}/w[0-9]{1,4}\.sock")
_PLAIN_NAMES = frozenset({KEEPER_NAME, ECHO_NAME, CONTROL_NAME})
_MAX_CONTEXTS = 1024
# A connection without traffic whose other machine is gone is noticed within these.
_IDLE_S, _INTERVAL_S, _PROBES = 3, 1, 3
_STREAM_LIMIT_BYTES = 64 * 1024


class HatchError(ConnectionError):
    """A hatch that cannot be used; the text says why, without its address."""


class HatchRefusedError(HatchError):
    """A hatch that accepts the token, and whose answer was no: its node lives."""


# -- the lines, for both sides --------------------------------------------------------------------
def known_name(name: str) -> bool:
    """Whether a hatch passes on connections to this name."""
    return name in _PLAIN_NAMES or _FOLDER_NAMES.fullmatch(name) is not None


def is_bulk_name(name: str) -> bool:
    """Whether the process that relays weights passes on connections to this name."""
    return name == ECHO_NAME or _BULK_NAMES.fullmatch(name) is not None


def greeting_line(nonce: str) -> bytes:
    """The first line of a hatch."""
    return f"{_GREETING}{nonce}\n".encode()


def answer_line(token: str, greeting: bytes, name: str) -> bytes:
    """The client's answer to a greeting. Raises HatchError if that is of no hatch."""
    text = greeting.decode("ascii", errors="replace").rstrip("\n")
    nonce = text.removeprefix(_GREETING)
    if not text.startswith(_GREETING) or not _NONCE.fullmatch(nonce):
        raise HatchError("what answers is no hatch of this version of OServe")
    return f"{_proof(token, nonce, name)} {name}\n".encode()


def proved_name(token: str, nonce: str, line: bytes) -> str | None:
    """The name that an answer asks for; ``None`` if it does not prove the token."""
    proof, separator, rest = line.rstrip(b"\n").partition(b" ")
    try:
        name = rest.decode("ascii")
    except UnicodeDecodeError:
        return None
    if not separator or not hmac.compare_digest(proof, _proof(token, nonce, name).encode()):
        return None
    return name


def verdict_line(reason: str = "") -> bytes:
    """The hatch's last line; ``reason``: why not."""
    return _REFUSED + reason.replace("\n", " ").encode()[:400] + b"\n" if reason else _OK + b"\n"


def check_verdict(line: bytes) -> None:
    """Raises HatchRefusedError, or HatchError if it is no verdict."""
    line = line.rstrip(b"\n")
    if line.startswith(_REFUSED):
        reason = line.removeprefix(_REFUSED).decode(errors="replace")
        raise HatchRefusedError(f"the node's hatch refused: {reason}")
    if line != _OK:
        raise HatchError("the node's hatch answered in an unknown form")


def _proof(token: str, nonce: str, name: str) -> str:
    return hmac.new(token.encode(), f"{nonce} {name}".encode(), hashlib.sha256).hexdigest()


# -- certificates ---------------------------------------------------------------------------------
@functools.lru_cache(maxsize=_MAX_CONTEXTS)
def pinned_context(certificate: str) -> ssl.SSLContext:
    """A client's context that trusts this certificate (PEM) alone. Raises HatchError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # A certificate is known by what it is; names and addresses of nodes change.
    context.check_hostname = False
    try:
        context.load_verify_locations(cadata=certificate)
    except (ssl.SSLError, ValueError):
        raise HatchError("the certificate that is known of the node cannot be read") from None
    return context


def check_certificate(certificate: str, found: bytes | None) -> None:
    """Raises HatchError unless ``found`` (DER) is that certificate (PEM) itself."""
    if found is None or not hmac.compare_digest(found, ssl.PEM_cert_to_DER_cert(certificate)):
        raise _stranger()


def fingerprint_of(certificate: str) -> str:
    """SHA-256 of a certificate (PEM), as 64 hexadecimal digits."""
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(certificate)).hexdigest()


async def fetch_certificate(
    host: str, port: int, fingerprint: str, *, timeout_s: float = ANSWER_LIMIT_S
) -> str:
    """The certificate (PEM) of the hatch at this port, if it has this fingerprint.

    Raises HatchError if it has another, or cannot be reached.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    # The fingerprint is the check.
    context.verify_mode = ssl.CERT_NONE
    try:
        async with asyncio.timeout(timeout_s):
            _, writer = await asyncio.open_connection(host, port, ssl=context)
    except OSError as error:
        raise hatch_error(error, timeout_s) from None
    found = writer.get_extra_info("ssl_object").getpeercert(True)
    writer.transport.abort()
    told = fingerprint.replace(":", "").strip().lower()
    if found is None or not hmac.compare_digest(hashlib.sha256(found).hexdigest(), told):
        raise _stranger()
    return ssl.DER_cert_to_PEM_cert(found)


def hatch_error(error: OSError, timeout_s: float = ANSWER_LIMIT_S) -> HatchError:
    """The same in words, without the address that it may name."""
    match error:
        case HatchError():
            return error
        case ssl.SSLCertVerificationError():
            return _stranger()
        case ssl.SSLError():
            return HatchError(f"no TLS with the node's hatch: {error.reason or 'it broke off'}")
        case TimeoutError():
            return HatchError(f"the node's hatch gave no answer within {timeout_s:g} s")
        case socket.gaierror():
            return HatchError("the host name of the node's hatch is unknown")
    reason = os.strerror(error.errno) if error.errno else "it closed the connection"
    return HatchError(f"the node's hatch cannot be reached: {reason}")


def _stranger() -> HatchError:
    return HatchError("the node's hatch shows another certificate than the one known of it")


def keep_alive(connection: socket.socket) -> None:
    """Notice within seconds that the other machine is gone, and delay no small piece."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _IDLE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _INTERVAL_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)


# -- the client -----------------------------------------------------------------------------------
class _Greeting(asyncio.Protocol):
    """The client's side of the greeting; its successor takes the connection over."""

    def __init__(
        self, address: HatchAddress, name: str, successor: Callable[[], asyncio.BaseProtocol]
    ) -> None:
        self._address = address
        self._name = name
        self._make = successor
        self._buffer = b""
        self._answered = False
        self._transport: asyncio.Transport | None = None
        loop = asyncio.get_running_loop()
        self.opened: asyncio.Future[tuple[asyncio.Transport, asyncio.BaseProtocol]] = (
            loop.create_future()
        )

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one by shape only
        keep_alive(transport.get_extra_info("socket"))
        found = transport.get_extra_info("ssl_object").getpeercert(True)
        try:
            check_certificate(self._address.certificate, found)
        except HatchError as error:
            self.failed(error)

    def data_received(self, data: bytes) -> None:
        transport = self._transport
        if transport is None or self.opened.done():
            return
        self._buffer += data
        line, end, rest = self._buffer.partition(b"\n")
        if not end and len(line) <= MAX_LINE_BYTES:
            return
        try:
            if self._answered:
                check_verdict(line)
            else:
                transport.write(answer_line(self._address.token, line, self._name))
        except HatchError as error:
            self.failed(error)
            return
        self._buffer = rest
        if self._answered:
            self._hand_over(transport, rest)
        self._answered = True

    def _hand_over(self, transport: asyncio.Transport, rest: bytes) -> None:
        successor = cast(asyncio.Protocol, self._make())
        transport.set_protocol(successor)
        successor.connection_made(transport)
        self.opened.set_result((transport, successor))
        if rest:
            successor.data_received(rest)

    def failed(self, error: OSError) -> None:
        """Nothing is opened, because of this."""
        if not self.opened.done():
            self.opened.set_exception(error)
        if self._transport is not None:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answered:
            reason = "it does not know the token, or has too many connections"
        else:
            reason = "it closed the connection before it spoke"
        self.failed(HatchError(f"the node's hatch cut the connection off: {reason}"))


async def connect_hatch(
    loop: asyncio.AbstractEventLoop,
    factory: Callable[[], asyncio.BaseProtocol],
    address: HatchAddress,
    name: str,
    *,
    timeout_s: float = ANSWER_LIMIT_S,
) -> tuple[asyncio.Transport, asyncio.BaseProtocol]:
    """As ``loop.create_unix_connection``, to the socket ``name`` behind a hatch.

    Raises HatchError, which is a ConnectionError; HatchRefusedError if the node lives, but has no
    such socket.
    """
    greeting = _Greeting(address, name, factory)
    transport: asyncio.Transport | None = None
    layer = TlsLayer(pinned_context(address.certificate), greeting, greeting.failed)
    try:
        async with asyncio.timeout(timeout_s):
            transport, _ = await loop.create_connection(lambda: layer, address.host, address.port)
            return await greeting.opened
    except OSError as error:
        _dropped(greeting, transport)
        raise hatch_error(error, timeout_s) from None
    except asyncio.CancelledError:
        _dropped(greeting, transport)
        raise


def _dropped(greeting: _Greeting, transport: asyncio.Transport | None) -> None:
    """Close what nobody will use, and take the result that nobody will await."""
    if transport is not None:
        transport.abort()
    if not greeting.opened.cancel() and not greeting.opened.cancelled():
        greeting.opened.exception()


async def open_hatch(
    address: HatchAddress,
    name: str,
    *,
    limit: int = _STREAM_LIMIT_BYTES,
    timeout_s: float = ANSWER_LIMIT_S,
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """As ``asyncio.open_unix_connection``, to the socket ``name`` behind a hatch.

    ``limit``: the longest line that the reader holds (bytes). Raises as ``connect_hatch``.
    """
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=limit, loop=loop)
    factory = lambda: asyncio.StreamReaderProtocol(reader, loop=loop)  # noqa: E731
    transport, protocol = await connect_hatch(loop, factory, address, name, timeout_s=timeout_s)
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)
