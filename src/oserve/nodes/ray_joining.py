"""What a Ray helper needs before it joins: its line to the server, and what keeps it from joining.

Ray waits for a minute or longer for a head, a raylet or a token, and then says little or aborts.
"""

import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Final

from oserve.core import OServeError
from oserve.nodes.ray_messages import HelperEvent, encoded

_KNOCK_S = 5.0
_RAYLET_S = 15.0
_POLL_S = 0.5
# By it Ray, too, finds the raylet that a driver belongs to.
_RAYLET_FLAG: Final = b"--node_id"
_NO_TOKEN: Final = b"InvalidAuthToken"
_MOST_REFUSALS: Final = 3

RAYLET_REMEDY: Final = (
    "start Ray on this machine too (ray start --address=HEAD:6379 --num-cpus=0 --num-gpus=0): a "
    "server must run on one of the cluster's nodes"
)


def knock(host: str, port: int) -> None:
    """See that something listens at the head's address. Raises OServeError."""
    try:
        socket.create_connection((host, port), _KNOCK_S).close()
    except OSError as error:
        raise OServeError(
            f"no Ray head answers at that address: {error.strerror or error}",
            place="--cluster",
            remedy="check the address, and that ray start --head runs there",
        ) from None


def await_raylet(proc: Path = Path("/proc"), *, limit_s: float = _RAYLET_S) -> None:
    """Wait for a raylet on this machine, which may be starting. Raises OServeError."""
    deadline_s = time.monotonic() + limit_s
    while not runs_raylet(proc):
        if time.monotonic() >= deadline_s:
            raise OServeError(
                "Ray does not run on this machine: it has no raylet",
                place="--cluster",
                remedy=RAYLET_REMEDY,
            )
        time.sleep(_POLL_S)


def runs_raylet(proc: Path) -> bool:
    """Whether a process in ``proc`` is a raylet, or one of its own."""
    for entry in proc.iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if any(word.startswith(_RAYLET_FLAG) for word in words):
                return True
    return False


class TokenWatch:
    """Reads what Ray writes to standard error while it joins, and passes it on.

    ``refused`` is called once Ray's head has refused this process's token a few times; Ray itself
    would go on trying.
    """

    def __init__(self, refused: Callable[[], None]) -> None:
        self._refused = refused
        self._left = _MOST_REFUSALS
        self._kept = os.dup(2)
        reading, writing = os.pipe()
        os.dup2(writing, 2)
        os.close(writing)
        self._thread = threading.Thread(target=self._read, args=(reading,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Give standard error back."""
        os.dup2(self._kept, 2)
        # Without a writer it ends, unless a child has the pipe.
        self._thread.join(_POLL_S)

    def _read(self, descriptor: int) -> None:
        with os.fdopen(descriptor, "rb", buffering=0) as lines:
            for line in iter(lines.readline, b""):
                os.write(self._kept, line)
                if _NO_TOKEN in line:
                    self._left -= 1
                    if not self._left:
                        self._refused()


class HelperLines:
    """Standard output as it was when the process started: Ray's libraries write to it as well."""

    def __init__(self) -> None:
        self._file: BinaryIO = os.fdopen(os.dup(1), "wb", buffering=0)
        os.dup2(2, 1)
        self._lock = threading.Lock()

    def tell(self, event: HelperEvent) -> None:
        with self._lock:
            try:
                self._file.write(encoded(event))
            except OSError:
                os._exit(0)  # the server has gone
