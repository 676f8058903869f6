"""How the gateway and engines hand the KV cache of a running request from one engine to another.

Every request that may move carries a name for its cache (``giving``). Before the gateway aborts the
request, it asks for the cache in a folder (``CacheFolder.ask``). The engine finds the name there
and writes the cache beside it: a part from each of its workers, and a note that describes them. The
request continues on another engine with that name (``taking``), and that engine loads the parts. It
recomputes whatever is missing or does not fit.
"""

import contextlib
import os
import re
import time
import uuid
from pathlib import Path

import msgspec

FIELD = "kv_transfer_params"
"""vLLM's request field for KV cache transfer."""

_OWN, _FROM = "oserve", "oserve_from"
_NAME = re.compile(r"[0-9a-f]{32}")


def new_name() -> str:
    """A name for one request's cache that cannot be guessed."""
    return uuid.uuid4().hex


def giving(name: str) -> dict[str, str]:
    """The field of a request whose cache may be asked for by this name."""
    return {_OWN: name}


def taking(name: str) -> dict[str, str]:
    """The field of a request that starts from the cache of this name."""
    return {_FROM: name}


def own_name(fields: object) -> str:
    """The name for the request's own cache, or ""; ``fields`` may be anything a client sends."""
    return _name(fields, _OWN)


def taken_name(fields: object) -> str:
    """The name of the cache that the request starts from, or ""."""
    return _name(fields, _FROM)


def _name(fields: object, key: str) -> str:
    value = fields.get(key) if isinstance(fields, dict) else None
    return value if isinstance(value, str) and _NAME.fullmatch(value) else ""


class Note(msgspec.Struct, frozen=True, kw_only=True):
    """Describes a cache: its first ``tokens``, in so many ``parts``, and their ``form``.

    ``form`` is equal for engines that can take in each other's caches. No parts: it is lost.
    """

    tokens: int = 0
    parts: int = 0
    form: str = ""


_NOTE_DECODER = msgspec.json.Decoder(Note)


class CacheFolder:
    """Holds caches on their way between two engines of one machine. Callers validate names."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)

    def ask(self, name: str) -> None:
        """Ask the engine to keep the cache of a request before that request is aborted."""
        (self._path / f"{name}.asked").touch()

    def asked(self, name: str) -> bool:
        """Whether the cache was asked for; true once."""
        try:
            (self._path / f"{name}.asked").unlink()
        except OSError:
            return False
        return True

    def put_note(self, name: str, note: Note) -> None:
        """Write the note that describes the parts."""
        path = self._path / f"{name}.note"
        partial = path.with_suffix(".new")
        partial.write_bytes(msgspec.json.encode(note))
        partial.replace(path)

    def note(self, name: str) -> Note | None:
        """The note of a cache, once all its parts are there or it is known to be lost."""
        try:
            found = _NOTE_DECODER.decode((self._path / f"{name}.note").read_bytes())
        except (OSError, msgspec.DecodeError):
            return None
        if (self._path / f"{name}.lost").exists():
            return Note()
        there = all(self.part(name, number).exists() for number in range(found.parts))
        return found if there else None

    def part(self, name: str, number: int) -> Path:
        """The path of one worker's part, which appears whole."""
        return self._path / f"{name}.{number}"

    def lose(self, name: str) -> None:
        """Mark a cache as lost: a part could not be written."""
        with contextlib.suppress(OSError):
            (self._path / f"{name}.lost").touch()

    def remove(self, name: str) -> None:
        """Remove all files of a cache that was loaded or is not wanted any more."""
        for path in self._path.glob(f"{name}.*"):
            with contextlib.suppress(OSError):
                path.unlink()

    def sweep(self, older_s: float) -> None:
        """Remove files older than ``older_s``: no engine will load them."""
        now_s = time.time()
        with os.scandir(self._path) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    if now_s - entry.stat().st_mtime > older_s:
                        Path(entry.path).unlink(missing_ok=True)
