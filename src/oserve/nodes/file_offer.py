"""Sends files of a model to nodes that ask through this one's hatch. Blocks, in threads."""

import contextlib
import hashlib
import os
import socket
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from oserve.nodes.fetch_messages import FileHead, FileTail, FileWish
from oserve.wire.hatch import MAX_LINE_BYTES

_BLOCK_BYTES = 1 << 20
_SILENCE_S = 60.0
# One sends to one other at a time; the rest is for those whose end was not noticed yet.
_MOST_VISITORS = 8
_WISHES = msgspec.json.Decoder(FileWish)


class FileOffer:
    """Listens at ``path`` until ``close``. ``folders``: of each model that is offered."""

    def __init__(self, path: str) -> None:
        self._folders: dict[str, Path] = {}
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(path)
        self._socket.listen(_MOST_VISITORS)
        self._free = threading.Semaphore(_MOST_VISITORS)
        threading.Thread(target=self._accept, daemon=True).start()

    def add(self, model: str, folder: Path) -> None:
        """Offer the files of a folder, too."""
        self._folders[model] = folder

    def close(self) -> None:
        """Take no more visitors."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                visitor, _ = self._socket.accept()
            except OSError:
                return
            if not self._free.acquire(blocking=False):
                visitor.close()
                continue
            threading.Thread(target=self._serve, args=(visitor,), daemon=True).start()

    def _serve(self, visitor: socket.socket) -> None:
        try:
            # ValueError: a line that cannot be read.
            with visitor, contextlib.suppress(OSError, ValueError):
                send_files(visitor, self._folders)
        finally:
            self._free.release()


def send_files(visitor: socket.socket, folders: Mapping[str, Path]) -> None:
    """Answer the wishes of one visitor until it leaves. Raises OSError, ValueError."""
    visitor.settimeout(_SILENCE_S)
    with visitor.makefile("rb") as lines:
        while line := lines.readline(MAX_LINE_BYTES):
            wish = _WISHES.decode(line)
            folder = folders.get(wish.model)
            try:
                if folder is None:
                    raise FileNotFoundError
                source = (folder / wish.file).open("rb", buffering=0)
            except OSError:
                _tell(visitor, FileHead(error="it is not offered"))
                continue
            with source:
                _send(visitor, source.fileno(), wish)


def _send(visitor: socket.socket, source: int, wish: FileWish) -> None:
    """The rest of a file; a file that gets shorter meanwhile ends the connection."""
    size = os.fstat(source).st_size
    digest = hashlib.sha256()
    offset = wish.offset if wish.offset <= size else 0
    for block in _blocks(source, 0, offset):
        digest.update(block)
    if digest.hexdigest() != wish.prefix:
        offset, digest = 0, hashlib.sha256()
    _tell(visitor, FileHead(size_bytes=size, offset=offset))
    for block in _blocks(source, offset, size):
        digest.update(block)
        visitor.sendall(block)
    _tell(visitor, FileTail(sha256=digest.hexdigest()))


def _blocks(source: int, start: int, end: int) -> Iterator[memoryview]:
    buffer = bytearray(_BLOCK_BYTES)
    view = memoryview(buffer)
    while start < end:
        size = os.preadv(source, [view[: min(_BLOCK_BYTES, end - start)]], start)
        if size == 0:
            raise ConnectionError("the file has become shorter")
        start += size
        yield view[:size]


def _tell(visitor: socket.socket, message: FileHead | FileTail) -> None:
    visitor.sendall(msgspec.json.encode(message) + b"\n")
