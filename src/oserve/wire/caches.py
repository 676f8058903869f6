"""How gateway and engines hand the KV cache of a running request from one engine to another.

Every request that may move carries a name of its own (``giving``). Whoever takes it away from an
engine first leaves that name in a folder (``CacheFolder.ask``); the engine, told to give the
request up, finds it there and puts the cache beside it: a part from each of its workers and a note
that says what they hold. The request goes on elsewhere with that name (``taking``), by which the
other engine takes the parts in. What is missing or does not fit is computed again.
"""

import contextlib
import os
import re
import time
import uuid
from pathlib import Path

import msgspec

FIELD = "kv_transfer_params"
"""vLLM's field of a request for whatever moves caches."""

_OWN, _FROM = "oserve", "oserve_from"
_NAME = re.compile(r"[0-9a-f]{32}")


def new_name() -> str:
    """Of one request's cache; nobody can guess it."""
    return uuid.uuid4().hex


def giving(name: str) -> dict[str, str]:
    """What a request says whose cache may be asked for by this name."""
    return {_OWN: name}


def taking(name: str) -> dict[str, str]:
    """What a request says besides that begins with the cache of this name."""
    return {_FROM: name}


def own_name(fields: object) -> str:
    """The name of its own that a request carries, or nothing; a client may send anything."""
    return _name(fields, _OWN)


def taken_name(fields: object) -> str:
    """The name of the cache that a request begins with, or nothing."""
    return _name(fields, _FROM)


def _name(fields: object, key: str) -> str:
    value = fields.get(key) if isinstance(fields, dict) else None
    return value if isinstance(value, str) and _NAME.fullmatch(value) else ""


class Note(msgspec.Struct, frozen=True, kw_only=True):
    """Of a cache: ``tokens`` from the beginning, in so many parts, and in what form.

    ``form`` is equal for engines that can take in each other's caches. No parts: it is lost.
    """

    tokens: int = 0
    parts: int = 0
    form: str = ""


class CacheFolder:
    """Where caches lie between two engines of one machine; names are checked by who reads them."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)

    def ask(self, name: str) -> None:
        """Have the engine keep the cache of a request that it is about to be told to give up."""
        (self._path / f"{name}.asked").touch()

    def asked(self, name: str) -> bool:
        """Whether somebody wants it; tells so once."""
        try:
            (self._path / f"{name}.asked").unlink()
        except OSError:
            return False
        return True

    def put_note(self, name: str, note: Note) -> None:
        """Tell what the parts hold."""
        path = self._path / f"{name}.note"
        partial = path.with_suffix(".new")
        partial.write_bytes(msgspec.json.encode(note))
        partial.replace(path)

    def note(self, name: str) -> Note | None:
        """What is told of a cache, once all parts are there or it is known that none will be."""
        try:
            found = msgspec.json.decode((self._path / f"{name}.note").read_bytes(), type=Note)
        except (OSError, msgspec.DecodeError):
            return None
        if (self._path / f"{name}.lost").exists():
            return Note()
        there = all(self.part(name, number).exists() for number in range(found.parts))
        return found if there else None

    def part(self, name: str, number: int) -> Path:
        """What one worker held; it appears whole."""
        return self._path / f"{name}.{number}"

    def lose(self, name: str) -> None:
        """A part could not be put there."""
        with contextlib.suppress(OSError):
            (self._path / f"{name}.lost").touch()

    def remove(self, name: str) -> None:
        """All of a cache that was taken in, or that nobody waits for."""
        for path in self._path.glob(f"{name}.*"):
            with contextlib.suppress(OSError):
                path.unlink()

    def sweep(self, older_s: float) -> None:
        """Remove what has lain there for so long: who wanted it is gone."""
        now_s = time.time()
        with os.scandir(self._path) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    if now_s - entry.stat().st_mtime > older_s:
                        Path(entry.path).unlink(missing_ok=True)
