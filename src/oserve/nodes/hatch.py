"""The hatch process: ``python -m oserve.nodes.hatch``, held by the keeper of its node.

It reads its ``HatchConfig`` as one JSON line from standard input and ends when that closes, so it
cannot outlive the keeper. It publishes its address in ``hatch.json`` in the node's private folder.
See ``wire.hatch`` for the greeting. Weights between ranks go through a second process, so that they
do not delay streams of tokens (``hatch_bulk``).
"""

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import ssl
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import uvloop

from oserve.core import OServeError
from oserve.engines.weights.sockets import OUT_SOCKET
from oserve.nodes.hatch_admission import Admission
from oserve.nodes.hatch_bulk import BulkRelay
from oserve.nodes.hatch_channel import FarEnd, NearEnd, fork_with_channel
from oserve.nodes.hatch_identity import make_identity, serving_context, write_private
from oserve.nodes.hatch_messages import (
    ADDRESS_FILE,
    PEERS_FILE,
    ControlCommand,
    ControlDone,
    ControlReply,
    HatchConfig,
    HatchIdentity,
    HatchReport,
    PeersUpdate,
    PublishedHatch,
)
from oserve.nodes.hatch_relay import Visitor
from oserve.wire.hatch import BULK_BYTE, keep_alive
from oserve.wire.tls import TlsLayer

_HATCH_CONFIG_DECODER = msgspec.json.Decoder(HatchConfig)

_log = logging.getLogger("oserve.hatch")

_BACKLOG = 1024
_ACCEPT_AT_ONCE = 64
_OUT_OF_FILES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
_RETRY_S = 0.1
# After the end of a socket within, for a slow client to read what is left of it.
_FLUSH_LIMIT_S = 300.0
_NICE = 5


class Hatch:
    """Accepts connections, and relays those that prove the token."""

    def __init__(
        self, config: HatchConfig, identity: HatchIdentity, port: socket.socket, far: socket.socket
    ) -> None:
        self.folder = Path(config.folder)
        self.token = identity.token
        self.answer_s = config.limits.answer_s
        self._limits = config.limits
        self._node = config.node
        self._context: ssl.SSLContext = serving_context(identity)
        self._port = port
        self._admission = Admission(
            greetings=config.limits.greetings, refusals_per_s=config.limits.refusals_per_s
        )
        self._loop = asyncio.get_running_loop()
        self.ended = asyncio.Event()
        self._bulk = NearEnd(far, self._loop, self._refuse, self.ended.set)
        self._keys = 0
        self._open: set[int] = set()
        self._accepted = 0
        # What ends a greeting under way, and what ends its time.
        self._cuts: dict[int, Callable[[str], None]] = {}
        self._timers: dict[int, asyncio.TimerHandle] = {}
        self._handshakes: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Begin to accept."""
        self._port.setblocking(False)
        self._loop.add_reader(self._port.fileno(), self._accept)

    def close(self) -> None:
        """Accept no more, and end the process that relays weights."""
        self._loop.remove_reader(self._port.fileno())
        self._port.close()
        self._bulk.close()

    # -- accepting ------------------------------------------------------------------------------
    def _accept(self) -> None:
        for _ in range(_ACCEPT_AT_ONCE):
            try:
                connection, address = self._port.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _OUT_OF_FILES:
                    _log.error("cannot accept: %s", error.strerror)
                    self._loop.remove_reader(self._port.fileno())
                    self._loop.call_later(_RETRY_S, self.start)
                    return
                continue  # it has left again
            self._begin(connection, str(address[0]))

    def _begin(self, connection: socket.socket, peer: str) -> None:
        if not self._admission.heard(peer, self._loop.time()):
            self._refuse(peer, "too many refusals of this address")
            connection.close()
            return
        connection.setblocking(False)
        keep_alive(connection)
        self._keys += 1
        key = self._keys
        file = connection.fileno()

        def cut(reason: str) -> None:
            self._loop.remove_reader(file)
            connection.close()
            self._refused(key, peer, reason)

        self._cuts[key] = cut
        self._timers[key] = self._loop.call_later(
            self.answer_s, self._cut, key, "it was silent for too long"
        )
        self._loop.add_reader(file, self._first_byte, key, connection, peer)
        oldest = self._admission.begun(key, peer)
        if oldest is not None:
            self._cut(oldest, "too many greetings at once")

    def _first_byte(self, key: int, connection: socket.socket, peer: str) -> None:
        """TLS begins at once, or after a byte that asks for the other process."""
        try:
            first = connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return
        except OSError:
            first = b""
        if not first:
            self._cut(key, "it left before its line was whole")
            return
        self._loop.remove_reader(connection.fileno())
        if first == BULK_BYTE:
            connection.recv(1)
            self._over(key)
            if not self._bulk.pass_on(connection, peer):
                self._refuse(peer, "the relay of weights is busy")
            connection.close()
            return
        visitor = Visitor(self, key, peer)

        def cut(reason: str) -> None:
            visitor.cut_off(reason)
            # In the middle of the handshake the visitor has no transport yet.
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

        self._cuts[key] = cut
        task = self._loop.create_task(self._handshake(visitor, connection))
        self._handshakes.add(task)
        task.add_done_callback(self._handshakes.discard)

    async def _handshake(self, visitor: Visitor, connection: socket.socket) -> None:
        def failed(_error: OSError) -> None:
            visitor.cut_off("no TLS, or the certificate was not accepted")

        layer = TlsLayer(self._context, visitor, failed, server_side=True, linger_s=_FLUSH_LIMIT_S)
        try:
            await self._loop.connect_accepted_socket(lambda: layer, connection)
        except OSError as error:
            failed(error)
            connection.close()

    # -- verdicts -------------------------------------------------------------------------------
    def _cut(self, key: int, reason: str) -> None:
        cut = self._cuts.get(key)
        if cut is not None:
            cut(reason)

    def _over(self, key: int) -> None:
        self._admission.over(key)
        self._cuts.pop(key, None)
        timer = self._timers.pop(key, None)
        if timer is not None:
            timer.cancel()

    def _refused(self, key: int, peer: str, reason: str) -> None:
        self._over(key)
        self._refuse(peer, reason)

    def _refuse(self, peer: str, reason: str) -> None:
        before = self._admission.refuse(peer, reason, self._loop.time())
        if before is not None:
            more = f" ({before} more since the last such line)" if before else ""
            _log.warning("refused a connection from %s: %s%s", peer, reason, more)

    def admit(self, visitor: Visitor) -> str:
        if len(self._open) >= self._limits.connections:
            return "too many connections are open"
        self._over(visitor.key)
        self._open.add(visitor.key)
        self._accepted += 1
        return ""

    def turn_away(self, visitor: Visitor, reason: str) -> None:
        self._refused(visitor.key, visitor.peer, reason)

    def left(self, visitor: Visitor) -> None:
        self._open.discard(visitor.key)

    # -- control --------------------------------------------------------------------------------
    def control(self, command: ControlCommand) -> ControlReply:
        if isinstance(command, PeersUpdate):
            write_private(self.folder / PEERS_FILE, msgspec.json.encode(command.peers))
            return ControlDone()
        counts = self._bulk.counts
        return HatchReport(
            node=self._node,
            open=len(self._open) + counts.open,
            accepted=self._accepted + counts.accepted,
            refused=dict(self._admission.refused),
            sent_bytes=counts.sent_bytes,
            received_bytes=counts.received_bytes,
        )


# -- the process ----------------------------------------------------------------------------------
def _listening(config: HatchConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host, config.port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise OServeError(
            f"the hatch cannot listen: {error.strerror or error}",
            place=f"hatch of {config.node}",
            remedy="give it an address of this node and a free port",
        ) from None


def _out_socket(folder: Path) -> socket.socket:
    path = folder / OUT_SOCKET
    path.unlink(missing_ok=True)
    out = socket.socket(socket.AF_UNIX)
    out.bind(str(path))
    out.listen(_BACKLOG)
    return out


def _check_folder(folder: Path) -> None:
    try:
        mode = stat.S_IMODE(folder.stat().st_mode)
    except OSError as error:
        reason = error.strerror or str(error)
    else:
        if mode & 0o077 == 0:
            return
        reason = "other users can enter it"
    raise OServeError(
        f"this is no private folder: {reason}",
        place=str(folder),
        remedy="make it with mode 0700",
    )


async def _serve(
    config: HatchConfig, identity: HatchIdentity, port: socket.socket, far: socket.socket
) -> int:
    hatch = Hatch(config, identity, port, far)
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stopped.set)
    loop.add_signal_handler(signal.SIGINT, lambda: None)
    loop.add_reader(sys.stdin.fileno(), _end_at_eof, stopped)
    hatch.start()
    file = Path(config.folder) / ADDRESS_FILE
    published = PublishedHatch(
        pid=os.getpid(),
        port=port.getsockname()[1],
        certificate=identity.certificate,
        token=identity.token,
    )
    write_private(file, msgspec.json.encode(published))
    waits = [loop.create_task(event.wait()) for event in (stopped, hatch.ended)]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    file.unlink(missing_ok=True)
    (Path(config.folder) / OUT_SOCKET).unlink(missing_ok=True)
    hatch.close()
    for wait in waits:
        wait.cancel()
    return 0 if stopped.is_set() else 1


def _end_at_eof(ended: asyncio.Event) -> None:
    if not os.read(sys.stdin.fileno(), 1):
        ended.set()


def main() -> int:
    """Entry point; 1 if the process that relays weights has ended by itself."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        config = _HATCH_CONFIG_DECODER.decode(sys.stdin.buffer.readline())
        folder = Path(config.folder)
        _check_folder(folder)
        identity = config.identity or make_identity(config.node)
        serving_context(identity)
        port, out = _listening(config), _out_socket(folder)
    except (msgspec.DecodeError, OServeError, OSError) as error:
        _log.error("the hatch cannot start: %s", error)
        return 2

    def relay(line: FarEnd) -> None:
        port.close()
        os.nice(_NICE)  # serving goes before
        BulkRelay(config, identity, out, line).run()

    far = fork_with_channel(relay)
    out.close()
    return uvloop.run(_serve(config, identity, port, far))


if __name__ == "__main__":
    sys.exit(main())
