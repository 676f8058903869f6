"""A hatch in the process of the test: both of its parts, and what lies behind it."""

import asyncio
import contextlib
import itertools
import socket
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from oserve.core import HatchAddress
from oserve.engines.weights.sockets import OUT_SOCKET
from oserve.nodes.hatch import Hatch
from oserve.nodes.hatch_bulk import BulkRelay
from oserve.nodes.hatch_channel import FarEnd
from oserve.nodes.hatch_identity import make_identity
from oserve.nodes.hatch_messages import (
    PEERS_FILE,
    HatchConfig,
    HatchIdentity,
    HatchLimits,
)
from oserve.wire.hatch import open_hatch

# Keys take milliseconds to make, and no test needs its own.
IDENTITY: HatchIdentity = make_identity("n")
# How long anything may take on a busy machine.
LIMIT_S = 300.0
_names = itertools.count()


@dataclass(frozen=True, kw_only=True)
class RunningHatch:
    """``address``: how clients reach it. ``folder``: where its sockets lie."""

    hatch: Hatch
    address: HatchAddress
    folder: Path

    def listener(self, name: str) -> Path:
        """The path of a socket behind it; its folder is made."""
        path = self.folder / name
        path.parent.mkdir(mode=0o700, exist_ok=True)
        return path

    @property
    def out(self) -> str:
        return str(self.folder / OUT_SOCKET)

    def knows(self, **peers: "RunningHatch") -> None:
        """Tell it of other nodes."""
        addresses = {name: other.address for name, other in peers.items()}
        (self.folder / PEERS_FILE).write_bytes(msgspec.json.encode(addresses))


async def opened(
    address: HatchAddress, name: str
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """As ``open_hatch``, patiently."""
    return await open_hatch(address, name, timeout_s=LIMIT_S)


@contextlib.asynccontextmanager
async def running_hatch(
    tmp_path: Path, limits: HatchLimits | None = None, identity: HatchIdentity = IDENTITY
) -> AsyncIterator[RunningHatch]:
    """A hatch on a free port of the loopback; everything behind it ends with it."""
    folder = tmp_path / f"n{next(_names)}"
    folder.mkdir(mode=0o700)
    config = HatchConfig(
        node=folder.name,
        folder=str(folder),
        host="127.0.0.1",
        limits=limits or HatchLimits(answer_s=LIMIT_S),
    )
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    port = socket.create_server(("127.0.0.1", 0), backlog=1024)
    out = socket.socket(socket.AF_UNIX)
    out.bind(str(folder / OUT_SOCKET))
    out.listen()
    relay = BulkRelay(config, identity, out, FarEnd(far))
    thread = threading.Thread(target=relay.run, daemon=True)
    thread.start()
    hatch = Hatch(config, identity, port, near)
    hatch.start()
    address = HatchAddress(
        host="127.0.0.1",
        port=port.getsockname()[1],
        certificate=identity.certificate,
        token=identity.token,
    )
    try:
        yield RunningHatch(hatch=hatch, address=address, folder=folder)
    finally:
        hatch.close()
        await asyncio.to_thread(thread.join)
        # Wakes the thread that waits for ranks; the loop's own end is its error.
        with contextlib.suppress(OSError):
            out.shutdown(socket.SHUT_RDWR)
        out.close()
        far.close()
