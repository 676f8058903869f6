"""Fetches the files of a model from another node, through its hatch. Blocks, in a thread."""

import errno
import hashlib
import os
import ssl
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from oserve.core import OServeError
from oserve.nodes.examination import ModelFile
from oserve.nodes.fetch_messages import (
    FetchEnd,
    FetchProgress,
    FetchQuery,
    FileHead,
    FileTail,
    FileWish,
)
from oserve.nodes.hatch_blocking import dial_hatch, read_line
from oserve.nodes.model_files import cache_folder, note_revision, place_for
from oserve.nodes.model_staging import ModelStaging
from oserve.wire.hatch import HatchError

_FILE_TAIL_DECODER = msgspec.json.Decoder(FileTail)

_FILE_HEAD_DECODER = msgspec.json.Decoder(FileHead)

_BLOCK_BYTES = 1 << 20
# The other side reads what we have already, before it speaks.
_PATIENCE_S = 600.0
_SILENCE_S = 30.0
_HOPELESS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


class FileFetch:
    """One try to fetch all files that this node lacks. ``run`` blocks until ``stop``, or the end.

    ``cache`` and ``free_bytes`` are for tests.
    """

    def __init__(
        self, query: FetchQuery, *, cache: Path | None = None, free_bytes: int | None = None
    ) -> None:
        self._query = query
        self._cache = cache or cache_folder()
        self._free_bytes = free_bytes
        self._stopped = threading.Event()
        self._have = self._all = 0
        self._resumed = self._fetched = 0

    def stop(self) -> None:
        """Give up; what was fetched stays for the next try."""
        self._stopped.set()

    @property
    def progress(self) -> FetchProgress:
        """What is there so far."""
        return FetchProgress(have_bytes=self._have, all_bytes=self._all)

    def run(self) -> FetchEnd:
        """Fetch."""
        began_s = time.monotonic()
        error, refused = "", False
        try:
            self._run()
        except OServeError as no:
            error, refused = no.message, True
        except HatchError as broken:
            error = str(broken)
        except (OSError, ValueError) as broken:
            error = getattr(broken, "strerror", None) or str(broken) or "the connection broke"
            # The number of an error of TLS is none of the operating system.
            refused = (
                not isinstance(broken, ssl.SSLError) and getattr(broken, "errno", 0) in _HOPELESS
            )
        return FetchEnd(
            error=error,
            refused=refused,
            resumed_bytes=self._resumed,
            fetched_bytes=self._fetched,
            seconds=time.monotonic() - began_s,
        )

    def _run(self) -> None:
        query = self._query
        place = place_for(query.model, query.revision, self._cache)
        if place is None:
            raise OServeError(
                "the model is named by a relative path, which is another folder on each node",
                place="model",
                remedy="name it by an absolute path",
            )
        staging = ModelStaging(place, query.files, free_bytes=self._free_bytes)
        missing = staging.missing()
        if missing:
            with staging.opened():
                self._all = sum(file.size_bytes for file in missing)
                self._have = self._resumed = staging.have_bytes()
                with dial_hatch(query.source, query.name) as tls:
                    self._fetch_all(tls, staging, missing)
                staging.finish(missing)
        if query.revision:
            note_revision(query.model, query.revision, self._cache)

    def _fetch_all(
        self, tls: ssl.SSLSocket, staging: ModelStaging, missing: Sequence[ModelFile]
    ) -> None:
        for file in missing:
            part = staging.part(file)
            with part.open("ab"):
                pass
            with part.open("r+b", buffering=0) as target:
                self._fetch(tls, file, target.fileno())

    def _fetch(self, tls: ssl.SSLSocket, file: ModelFile, target: int) -> None:
        """One file, from where an earlier try has left off."""
        offset = min(os.fstat(target).st_size, file.size_bytes)
        digest = hashlib.sha256()
        buffer = memoryview(bytearray(_BLOCK_BYTES))
        start = 0
        while start < offset:
            self._check_going()
            size = os.preadv(target, [buffer[: min(_BLOCK_BYTES, offset - start)]], start)
            if size == 0:
                raise ConnectionError(f"{file.name} has become shorter")
            digest.update(buffer[:size])
            start += size
        wish = FileWish(
            model=self._query.model, file=file.name, offset=offset, prefix=digest.hexdigest()
        )
        tls.sendall(msgspec.json.encode(wish) + b"\n")
        head = _FILE_HEAD_DECODER.decode(read_line(tls, time.monotonic() + _PATIENCE_S))
        if head.error or head.size_bytes != file.size_bytes:
            raise ConnectionError(f"{file.name}: {head.error or 'it has changed meanwhile'}")
        if head.offset != offset:
            self._have -= offset
            self._resumed -= offset
            offset, digest = 0, hashlib.sha256()
        os.ftruncate(target, offset)
        tls.settimeout(_SILENCE_S)
        while offset < file.size_bytes:
            self._check_going()
            size = tls.recv_into(buffer[: min(_BLOCK_BYTES, file.size_bytes - offset)])
            if size == 0:
                raise ConnectionError("the other node broke off")
            digest.update(buffer[:size])
            _write(target, buffer[:size], offset)
            offset += size
            self._have += size
            self._fetched += size
        tail = _FILE_TAIL_DECODER.decode(read_line(tls, time.monotonic() + _SILENCE_S))
        if tail.sha256 != digest.hexdigest():
            os.ftruncate(target, 0)
            raise ConnectionError(f"{file.name} arrived damaged")
        os.fsync(target)

    def _check_going(self) -> None:
        if self._stopped.is_set():
            raise ConnectionError("it was told to stop")


def _write(target: int, data: memoryview, offset: int) -> None:
    """All of it; the disk takes what it can at a time."""
    while data:
        size = os.pwrite(target, data, offset)
        data, offset = data[size:], offset + size
