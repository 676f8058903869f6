"""The greeting of a hatch in blocking calls, for threads that relay weights."""

import contextlib
import secrets
import socket
import ssl
import time

from oserve.core import HatchAddress
from oserve.wire.hatch import (
    ANSWER_LIMIT_S,
    BULK_BYTE,
    MAX_LINE_BYTES,
    HatchError,
    answer_line,
    check_certificate,
    check_verdict,
    greeting_line,
    hatch_error,
    keep_alive,
    pinned_context,
    proved_name,
)

_NO_WORD = "it does not know the token, or has too many connections"


def read_line(connection: socket.socket, deadline_s: float) -> bytes:
    """One line, without its end, and not a byte more. Raises OSError, and HatchError at the end.

    ``deadline_s``: on the monotonic clock.
    """
    line = b""
    while not line.endswith(b"\n"):
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        connection.settimeout(left_s)
        # Lines are short and rare, and what follows them belongs to others.
        data = connection.recv(1)
        if not data:
            raise HatchError("the connection ended before its line was whole")
        line += data
        if len(line) > MAX_LINE_BYTES:
            raise HatchError("its line is too long")
    return line[:-1]


def dial_hatch(
    address: HatchAddress, name: str, *, timeout_s: float = ANSWER_LIMIT_S
) -> ssl.SSLSocket:
    """A connection to the socket ``name`` behind a hatch, for weights. Raises HatchError."""
    deadline_s = time.monotonic() + timeout_s
    with contextlib.ExitStack() as undo:
        try:
            plain = socket.create_connection((address.host, address.port), timeout_s)
            undo.callback(plain.close)
            keep_alive(plain)
            plain.sendall(BULK_BYTE)
            tls = pinned_context(address.certificate).wrap_socket(
                plain, do_handshake_on_connect=False
            )
            undo.callback(tls.close)
            tls.settimeout(max(0.01, deadline_s - time.monotonic()))
            tls.do_handshake()
            check_certificate(address.certificate, tls.getpeercert(True))
            greeting = read_line(tls, deadline_s)
            tls.sendall(answer_line(address.token, greeting, name))
            try:
                verdict = read_line(tls, deadline_s)
            except HatchError:
                raise HatchError(f"the node's hatch cut the connection off: {_NO_WORD}") from None
            check_verdict(verdict)
        except OSError as error:
            raise hatch_error(error, timeout_s) from None
        undo.pop_all()
    return tls


def greet(tls: ssl.SSLSocket, token: str, *, timeout_s: float) -> str:
    """The hatch's side: the name that the client asks for, once it has proved the token.

    Raises HatchError with the reason of a refusal, and OSError.
    """
    deadline_s = time.monotonic() + timeout_s
    tls.settimeout(timeout_s)
    try:
        tls.do_handshake()
    except ssl.SSLError:
        raise HatchError("no TLS, or the certificate was not accepted") from None
    nonce = secrets.token_hex(16)
    tls.sendall(greeting_line(nonce))
    name = proved_name(token, nonce, read_line(tls, deadline_s))
    if name is None:
        raise HatchError("wrong token, or a line of another connection")
    return name
