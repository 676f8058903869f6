"""The lock of a state folder: one server at a time."""

import fcntl
import os
from pathlib import Path

from oserve.core import OServeError
from oserve.engines.holding import keeper_runs


class StateLock:
    """Held until ``release`` or until this process ends, even by a kill.

    Raises OServeError if another server holds it.
    """

    def __init__(self, state_dir: Path) -> None:
        state_dir.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(state_dir / "server.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._descriptor, 32, 0).decode(errors="replace").strip()
            os.close(self._descriptor)
            raise OServeError(
                f"another server uses it (process {holder or 'unknown'})",
                place=str(state_dir),
                remedy="stop that server, or choose another --state-dir",
            ) from None
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Release the lock; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def serves_already(state_dir: Path) -> bool:
    """Whether a server, or what a killed one has left, uses the nodes of this state folder."""
    try:
        StateLock(state_dir).release()
    except OServeError:
        return True
    return keeper_runs(state_dir)
