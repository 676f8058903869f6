"""The key file: written by ``oserve keys``, read again by every gateway process when it changes.

A change replaces the whole file, so a reader sees the keys before or after it, never a part.
"""

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from oserve.core import KeyRole, OServeError
from oserve.gateway.access.keys import (
    KeyDocument,
    StoredKey,
    digest,
    empty_document,
    made_key,
)

_log = logging.getLogger("oserve.gateway")

KEY_FILE = "keys.json"
MOST_KEYS = 100_000
_DECODER: msgspec.json.Decoder[KeyDocument] = msgspec.json.Decoder(KeyDocument)

Stamp = tuple[int, int, int]
"""Inode, size and time of change of a file: what differs after a change."""


def read_keys(path: Path) -> KeyDocument | None:
    """The key file; ``None`` if there is none. Raises OServeError if it cannot be used."""
    try:
        document = _DECODER.decode(path.read_bytes())
    except FileNotFoundError:
        if path.is_symlink():
            raise _unusable(path, "it is a link to a file that does not exist") from None
        return None
    except OSError as error:
        raise _unusable(path, error.strerror or "it cannot be read") from None
    except (msgspec.DecodeError, ValueError):
        # The message of a decoder might quote the file.
        raise _unusable(path, "it is not a key file") from None
    return document


def _unusable(path: Path, reason: str) -> OServeError:
    return OServeError(
        f"the keys cannot be read: {reason}",
        place=str(path),
        remedy="restore it from a copy; only the server's user may read it",
    )


def stamp_of(path: Path) -> Stamp | None:
    """Its stamp; ``None`` if there is no such file."""
    try:
        return _stamp(path.stat())
    except OSError:
        return None


def _stamp(status: os.stat_result) -> Stamp:
    return status.st_ino, status.st_size, status.st_mtime_ns


class KeyStore:
    """Changes the key file; several commands at once take turns."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def keys(self) -> tuple[StoredKey, ...]:
        """The keys now."""
        document = read_keys(self._path)
        return () if document is None else document.keys

    def add(
        self, tenant: str, role: KeyRole, *, tier: str | None = None, tiers: tuple[str, ...] = ()
    ) -> tuple[StoredKey, str]:
        """Add a new key; returns its entry and the key itself, which is stored nowhere.

        Raises OServeError for a name that is not one, or too many keys.
        """
        _check_name("tenant", tenant)
        for name in (*tiers, *(() if tier is None else (tier,))):
            _check_name("tier", name)
        if tier is not None and tiers and tier not in tiers:
            raise OServeError(
                f"tier {tier!r} is not among those that the key allows",
                place="--tier",
                remedy="allow it with --allow-tier as well",
            )
        with self._locked():
            document = read_keys(self._path) or empty_document()
            if len(document.keys) >= MOST_KEYS:
                raise OServeError(
                    f"there are {MOST_KEYS} keys already",
                    place=str(self._path),
                    remedy="revoke some",
                )
            name, key = made_key()
            stored = StoredKey(
                id=name,
                tenant=tenant,
                role=role,
                digest=digest(key.encode(), bytes.fromhex(document.salt)).hex(),
                created_s=round(time.time(), 3),
                tier=tier,
                tiers=tiers,
            )
            self._write(msgspec.structs.replace(document, keys=(*document.keys, stored)))
        return stored, key

    def revoke(self, wanted: str) -> tuple[StoredKey, ...]:
        """Revoke the key with this id, or all keys of ``tenant:NAME``; returns them.

        Raises OServeError if there are none.
        """
        tenant = wanted.removeprefix("tenant:") if wanted.startswith("tenant:") else None
        if not self._path.parent.is_dir():
            # Most likely another folder was meant: none is made here.
            raise self._unknown(wanted)
        with self._locked():
            document = read_keys(self._path) or empty_document()
            gone = tuple(
                key
                for key in document.keys
                if (key.id == wanted if tenant is None else key.tenant == tenant)
            )
            if not gone:
                raise self._unknown(wanted)
            left = tuple(key for key in document.keys if key not in gone)
            self._write(msgspec.structs.replace(document, keys=left))
        return gone

    def _unknown(self, wanted: str) -> OServeError:
        return OServeError(
            f"there is no key {wanted!r}", place=str(self._path), remedy="see oserve keys list"
        )

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            lock = os.open(self._path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise self._unwritable(error) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def _write(self, document: KeyDocument) -> None:
        new = self._path.with_suffix(".new")
        try:
            new.unlink(missing_ok=True)
            handle = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(msgspec.json.format(msgspec.json.encode(document), indent=1))
                file.flush()
                os.fsync(file.fileno())
            new.replace(self._path)
        except OSError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> OServeError:
        return OServeError(
            f"the keys cannot be written: {error.strerror}",
            place=str(self._path),
            remedy="run this as the server's user, on the server's machine",
        )


def _check_name(what: str, name: str) -> None:
    plain = name.isascii() and name.replace("-", "").replace("_", "").replace(".", "").isalnum()
    if not plain or len(name) > 64:
        raise OServeError(
            f"{name[:80]!r} is no name of a {what}",
            place=f"--{what}" if what == "tier" else what.upper(),
            remedy="use up to 64 letters, digits, dots, dashes and underscores",
        )


class KeyFile:
    """The keys of the key file in one gateway process; ``check`` notices changes.

    No accident opens the gateway: a file that vanishes or cannot be read leaves the last keys in
    force, and if there were none yet, nobody has a key until it can be read.
    """

    def __init__(self, path: Path, changed: Callable[[KeyDocument], None]) -> None:
        self._path = path
        self._changed = changed
        self._stamp: Stamp | None = None
        self._checked = self._guarded = False
        self._fault = ""

    def check(self) -> None:
        """Read the file if it has changed. Raises OServeError at the first time only.

        A file that could not be read is tried again at every check, since what was the matter may
        pass without a change of it.
        """
        first, self._checked = not self._checked, True
        try:
            document = self._read()
        except OServeError as error:
            if first:
                raise
            self._told(str(error))
            return
        self._fault = ""
        if document is not None:
            self._use(document)
            _log.info("%d keys read", len(document.keys))

    def _read(self) -> KeyDocument | None:
        """The content if it has changed, else ``None``."""
        stamp = self._stamp_now()
        if stamp == self._stamp:
            return None
        document = None if stamp is None else read_keys(self._path)
        if document is None:
            raise _unusable(self._path, "it is gone")
        self._stamp = stamp
        return document

    def _stamp_now(self) -> Stamp | None:
        """``None`` only if there is certainly no file. Raises OServeError if nobody can tell."""
        try:
            status = self._path.stat()
        except FileNotFoundError:
            if self._path.is_symlink():
                raise _unusable(self._path, "it is a link to a file that does not exist") from None
            return None
        except OSError as error:
            raise _unusable(self._path, error.strerror or "it cannot be read") from None
        return _stamp(status)

    def _told(self, fault: str) -> None:
        if fault != self._fault:
            self._fault = fault
            kept = "the last keys stay in force" if self._guarded else "no key is valid until then"
            _log.error("%s; %s", fault, kept)
        if not self._guarded:
            self._use(empty_document())

    def _use(self, document: KeyDocument) -> None:
        self._guarded = True
        self._changed(document)
