"""The gateway's Unix socket: its path is taken only from a server that is gone."""

import contextlib
import errno
import os
import socket
import stat
from pathlib import Path

from oserve.core import OServeError

_MOST_PATH_BYTES = 107
# Whoever may enter its folder may call, as anybody on the machine may call a port of loopback.
_MODE = 0o666


def check_unix_socket(path: str) -> bool:
    """Whether a socket file is at ``path``. Raises OServeError if none can be there."""
    if not path.startswith("/"):
        raise _bad("its path is not absolute", path, "begin it with /")
    if len(os.fsencode(path)) > _MOST_PATH_BYTES:
        raise _bad(f"its path is longer than {_MOST_PATH_BYTES} bytes", path, "use a shorter one")
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        if not Path(path).parent.is_dir():
            raise _bad("its folder is not there", path, "make the folder first") from None
        return False
    except OSError as error:
        raise _bad(error.strerror or str(error), path, "use another path") from None
    if not stat.S_ISSOCK(mode):
        raise _bad("a file that is no socket has this path", path, "use another path")
    return True


def clear_unix_socket(path: str) -> None:
    """Make way for a socket at ``path``. Raises OServeError if it cannot be there."""
    if not check_unix_socket(path):
        return
    if _answers(path):
        raise _bad("another server listens on it", path, "end that one, or use another path")
    with contextlib.suppress(FileNotFoundError):
        Path(path).unlink()


def open_to_all(path: str) -> tuple[int, int]:
    """Let every user who can enter the folder call; returns the identity of the file."""
    Path(path).chmod(_MODE)
    return _identity(path)


def remove_unix_socket(path: str, identity: tuple[int, int]) -> None:
    """Remove the file, unless it is another server's by now."""
    with contextlib.suppress(FileNotFoundError):
        if _identity(path) == identity:
            Path(path).unlink()


def _identity(path: str) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        # Whatever else it answers, such as EAGAIN for a full backlog, somebody may listen.
        return probe.connect_ex(path) not in {errno.ECONNREFUSED, errno.ENOENT}


def _bad(message: str, path: str, remedy: str) -> OServeError:
    return OServeError(message, place=f"gateway.unix_socket: {path}", remedy=remedy)
