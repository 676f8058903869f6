"""The second process of a hatch: weights between ranks of two nodes, in blocking threads.

A rank that sends to another node connects to ``out.sock`` of its own node, with the line
``NODE NAME``; this process connects to that node's hatch and answers as a hatch does (``ok`` or
``no REASON``). Connections that other nodes' hatches open come from the first process, which knows
them by their first byte.
"""

import contextlib
import errno
import itertools
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from oserve.core import HatchAddress
from oserve.nodes.hatch_admission import Admission
from oserve.nodes.hatch_blocking import dial_hatch, greet, read_line
from oserve.nodes.hatch_channel import BulkCounts, BulkRefusal, FarEnd
from oserve.nodes.hatch_identity import serving_context
from oserve.nodes.hatch_messages import NODE_NAMES, PEERS_FILE, HatchConfig, HatchIdentity
from oserve.nodes.hatch_pump import BUFFER_BYTES, pump
from oserve.wire.hatch import ECHO_NAME, HatchError, is_bulk_name, verdict_line

_TELL_EVERY_S = 0.25
_RETRY_S = 0.1
_SOCKET_BYTES = 4 << 20
_REQUEST = re.compile(rf"({NODE_NAMES}) (\S+)")
_PEERS: msgspec.json.Decoder[dict[str, HatchAddress]] = msgspec.json.Decoder(
    dict[str, HatchAddress]
)


class BulkRelay:
    """Relays in threads, one for each connection, until the channel ends."""

    def __init__(
        self, config: HatchConfig, identity: HatchIdentity, out: socket.socket, line: FarEnd
    ) -> None:
        self._folder = Path(config.folder)
        self._limits = config.limits
        self._token = identity.token
        self._context = serving_context(identity)
        self._out = out
        self._line = line
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._admission = Admission(
            greetings=min(config.limits.greetings, config.limits.bulk_connections),
            refusals_per_s=config.limits.refusals_per_s,
        )
        self._greetings: dict[int, ssl.SSLSocket] = {}
        self._open = 0
        self._accepted = 0
        self._sent: dict[str, int] = {}
        self._received: dict[str, int] = {}
        self._told_s = 0.0

    def run(self) -> None:
        """Work until the first process ends."""
        threading.Thread(target=self._take_ranks, daemon=True).start()
        while (found := self._line.next()) is not None:
            connection, peer = found
            self._spawn(self._inbound, connection, peer)

    def _take_ranks(self) -> None:
        while True:
            try:
                rank, _ = self._out.accept()
            except OSError as error:
                if error.errno in {errno.EBADF, errno.EINVAL}:
                    return  # it is closed
                time.sleep(_RETRY_S)  # out of files, or a rank that has left again
                continue
            self._spawn(self._outbound, rank, "")

    def _spawn(
        self, work: Callable[[socket.socket, str], None], connection: socket.socket, peer: str
    ) -> None:
        with self._lock:
            full = self._open >= self._limits.bulk_connections
            self._open += not full
        if full:
            connection.close()
            self._line.tell(
                BulkRefusal(peer=peer or "this node", reason="too many streams of weights")
            )
            return
        threading.Thread(target=self._guarded, args=(work, connection, peer), daemon=True).start()

    def _guarded(
        self, work: Callable[[socket.socket, str], None], connection: socket.socket, peer: str
    ) -> None:
        try:
            with connection, contextlib.suppress(OSError):
                work(connection, peer)
        finally:
            with self._lock:
                self._open -= 1
            self._tell()

    # -- from other nodes -----------------------------------------------------------------------
    def _inbound(self, connection: socket.socket, peer: str) -> None:
        connection.setblocking(True)
        tls = self._context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        with tls:
            try:
                name = self._greeted(tls, peer)
            except OSError as error:
                reason = str(error) if isinstance(error, HatchError) else "it left, or was silent"
                self._line.tell(BulkRefusal(peer=peer, reason=reason))
                return
            self._serve(tls, name, peer)

    def _greeted(self, tls: ssl.SSLSocket, peer: str) -> str:
        """The name asked for. Too many greetings at once: the oldest is cut off."""
        key = next(self._numbers)
        with self._lock:
            self._greetings[key] = tls
            oldest = self._admission.begun(key, peer)
            cut = None if oldest is None else self._greetings.pop(oldest, None)
            if oldest is not None:
                self._admission.over(oldest)
            if cut is not None:
                # Not the TLS socket's own method, which its thread may be using.
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(cut, socket.SHUT_RDWR)
        try:
            return greet(tls, self._token, timeout_s=self._limits.answer_s)
        finally:
            with self._lock:
                self._admission.over(key)
                self._greetings.pop(key, None)

    def _serve(self, tls: ssl.SSLSocket, name: str, peer: str) -> None:
        if not is_bulk_name(name):
            self._line.tell(BulkRefusal(peer=peer, reason="there is no such name"))
            tls.sendall(verdict_line("there is no such name"))
            return
        with self._lock:
            self._accepted += 1
        if name == ECHO_NAME:
            tls.sendall(verdict_line())
            _echo(tls)
            return
        inner = socket.socket(socket.AF_UNIX)
        with inner:
            try:
                inner.settimeout(self._limits.answer_s)
                inner.connect(str(self._folder / name))
            except OSError:
                tls.sendall(verdict_line("nothing listens there"))
                return
            tls.sendall(verdict_line())
            _widen(inner)
            pump(tls, inner, lambda _sent, _received: None)

    # -- from ranks of this node ----------------------------------------------------------------
    def _outbound(self, rank: socket.socket, _peer: str) -> None:
        deadline_s = time.monotonic() + self._limits.answer_s
        try:
            node, tls = self._dialled(read_line(rank, deadline_s))
        except HatchError as error:
            rank.sendall(verdict_line(str(error)))
            return
        with tls:
            rank.sendall(verdict_line())
            _widen(rank)
            pump(tls, rank, lambda sent, received: self._count(node, sent, received))

    def _dialled(self, line: bytes) -> tuple[str, ssl.SSLSocket]:
        """The node that the line asks for, and a connection to the name there."""
        found = _REQUEST.fullmatch(line.decode(errors="replace"))
        if found is None or not is_bulk_name(found[2]):
            raise HatchError("a line to this node's hatch cannot be read")
        node, name = found.groups()
        address = read_peers(self._folder).get(node)
        if address is None:
            raise HatchError(f"this node's hatch does not know the node {node}")
        return node, dial_hatch(address, name, timeout_s=self._limits.answer_s)

    # -- counts ---------------------------------------------------------------------------------
    def _count(self, node: str, sent: int, received: int) -> None:
        with self._lock:
            self._sent[node] = self._sent.get(node, 0) + sent
            self._received[node] = self._received.get(node, 0) + received
            late = time.monotonic() - self._told_s >= _TELL_EVERY_S
        if late:
            self._tell()

    def _tell(self) -> None:
        with self._lock:
            self._told_s = time.monotonic()
            counts = BulkCounts(
                open=self._open,
                accepted=self._accepted,
                sent_bytes=dict(self._sent),
                received_bytes=dict(self._received),
            )
        self._line.tell(counts)


def read_peers(folder: Path) -> dict[str, HatchAddress]:
    """The other nodes, as the hatch in this folder was told last."""
    try:
        return _PEERS.decode((folder / PEERS_FILE).read_bytes())
    except (OSError, msgspec.DecodeError):
        return {}


def _echo(tls: ssl.SSLSocket) -> None:
    tls.settimeout(None)
    buffer = memoryview(bytearray(BUFFER_BYTES))
    while size := tls.recv_into(buffer):
        tls.sendall(buffer[:size])


def _widen(connection: socket.socket) -> None:
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        connection.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BYTES)
