"""The audit log: who changed the fleet, and who changed keys.

One JSON object a line, appended under a lock by the server and by ``oserve keys``; a full file is
rotated. Keys themselves are never in it.
"""

import fcntl
import os
from pathlib import Path
from typing import IO, Any

import msgspec

AUDIT_FILE = "audit.jsonl"
_MOST_BYTES = 8 * 1024 * 1024
_KEPT_FILES = 4


class AuditEntry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One entry. ``at_s``: Unix time. ``actor``: a key's id and tenant, or a user of the machine.

    ``action``: what was asked for; ``outcome``: ``done`` or why not.
    """

    at_s: float
    actor: str
    action: str
    outcome: str = "done"
    source: str = ""
    facts: dict[str, Any] = {}


class AuditLog:
    """Appends to the audit log of a state folder."""

    def __init__(
        self, path: Path, *, most_bytes: int = _MOST_BYTES, kept_files: int = _KEPT_FILES
    ) -> None:
        self._path = path
        self._most_bytes = most_bytes
        self._kept_files = kept_files

    def write(self, entry: AuditEntry) -> None:
        """Append an entry. Raises OSError if that is impossible."""
        line = msgspec.json.encode(entry) + b"\n"
        with self._opened() as file:
            if file.tell() and file.tell() + len(line) > self._most_bytes:
                self._rotate()
                with self._opened() as fresh:
                    fresh.write(line)
            else:
                file.write(line)

    def _opened(self) -> IO[bytes]:
        """The file, locked, at its end; of several writers each waits until it has the latest."""
        while True:
            handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            file = os.fdopen(handle, "ab")
            fcntl.flock(handle, fcntl.LOCK_EX)
            try:
                if os.stat(self._path).st_ino == os.fstat(handle).st_ino:
                    return file
            except FileNotFoundError:
                pass
            file.close()

    def _rotate(self) -> None:
        for index in range(self._kept_files - 1, 0, -1):
            older = self._numbered(index)
            if older.exists():
                older.replace(self._numbered(index + 1))
        self._path.replace(self._numbered(1))

    def _numbered(self, index: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{index}")
