"""Where fetched files of a model wait until all of them are there: beside their place, or in it.

A place that is there may be a disk of its own, to which nothing can be renamed from beside it. What
an earlier try has fetched is kept, so that the next one goes on from there; there is one such
folder for a place at most. Files that the place has already are left alone.
"""

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec

from oserve.core import OServeError
from oserve.nodes.examination import ModelFile
from oserve.nodes.model_files import digest_of

SPARE_BYTES: Final = 1 << 30
"""Room on the disk that is left to others."""

_MANIFEST = "manifest.json"
_LOCK = "lock"
_WHOLE = "files"
_LAST = "config.json"


class ModelStaging:
    """The files of one model on their way to ``place``; raise OSError, and OServeError to refuse.

    ``free_bytes`` is for tests.
    """

    def __init__(
        self, place: Path, files: Sequence[ModelFile], *, free_bytes: int | None = None
    ) -> None:
        self.place = place
        self._beside = place.parent / f".{place.name}.oserve-fetch"
        self._within = place.exists()
        self.folder = place / self._beside.name if self._within else self._beside
        self._files = tuple(files)
        self._free_bytes = free_bytes

    def missing(self) -> list[ModelFile]:
        """The files that the place lacks. Raises OServeError if it has others of their names."""
        found = []
        for file in self._files:
            own = self.place / file.name
            if not own.exists():
                found.append(file)
            elif digest_of(own) != file:
                raise OServeError(
                    f"{own} differs from that of other nodes, and is left alone",
                    place=str(self.place),
                    remedy="remove it, or copy the same revision of the model there",
                )
        return found

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Use the folder alone; one that is of other files is emptied first.

        Raises ConnectionError while another server has the node use it.
        """
        try:
            if self._within and self._beside.is_dir():
                self._take_over()
            self._check_room()
            self.folder.mkdir(parents=True, exist_ok=True)
        except (PermissionError, FileExistsError, NotADirectoryError) as error:
            raise self._unwritable(error.strerror) from None
        if self._within and not os.access(self.place, os.W_OK | os.X_OK):
            raise self._unwritable(os.strerror(errno.EACCES))
        with _locked(self.folder):
            self._begin()
            yield

    def part(self, file: ModelFile) -> Path:
        """Where the bytes of a file go."""
        return self.folder / f"{file.name}.part"

    def have_bytes(self) -> int:
        """The bytes that have been fetched so far."""
        whole = self.folder / _WHOLE
        return sum(_size(self.part(file)) or _size(whole / file.name) for file in self._files)

    def finish(self, missing: Sequence[ModelFile]) -> None:
        """Check the fetched files once more, and put them in place.

        A new folder appears with all of its files at once; in one that is there, the configuration
        comes last, without which no engine starts. What cannot be put in place is kept.
        """
        for file in missing:
            part = self.part(file)
            found = msgspec.structs.replace(digest_of(part), name=file.name)
            if found != file:
                part.unlink()
                raise ConnectionError(f"{file.name} is not the file that was promised")
        if self._within:
            for file in sorted(missing, key=lambda item: (item.name == _LAST, item.name)):
                os.replace(self.part(file), self.place / file.name)
            _sync(self.place)
        else:
            whole = self.folder / _WHOLE
            whole.mkdir(exist_ok=True)
            for file in missing:
                os.replace(self.part(file), whole / file.name)
            _sync(whole)
            os.rename(whole, self.place)
        _sync(self.place.parent)
        shutil.rmtree(self.folder, ignore_errors=True)

    # -- within ---------------------------------------------------------------------------------
    def _begin(self) -> None:
        """Keep what an earlier try for the same files has left, and nothing else."""
        wanted = msgspec.json.encode(self._files)
        manifest = self.folder / _MANIFEST
        if not (manifest.is_file() and manifest.read_bytes() == wanted):
            for item in self.folder.iterdir():
                if item.name == _LOCK:
                    continue
                if item.is_dir():
                    shutil.rmtree(item)
                else:
                    item.unlink()
            manifest.write_bytes(wanted)
        # Files that were checked, but not put in place.
        whole = self.folder / _WHOLE
        if whole.is_dir():
            for item in whole.iterdir():
                os.replace(item, whole.with_name(f"{item.name}.part"))
            whole.rmdir()

    def _take_over(self) -> None:
        """Go on with what was fetched before the place was there."""
        with _locked(self._beside):
            try:
                os.rename(self._beside, self.folder)
            except OSError:
                shutil.rmtree(self._beside, ignore_errors=True)

    def _unwritable(self, reason: str | None) -> OServeError:
        folder = self.place if self._within else self.place.parent
        return OServeError(
            f"this node's user cannot write at {folder}: {reason}",
            place=str(self.place),
            remedy="make that folder writable, or copy the model there",
        )

    def _check_room(self) -> None:
        needed = sum(file.size_bytes for file in self.missing()) - self.have_bytes()
        parent = self.folder
        while not parent.exists():
            parent = parent.parent
        free = self._free_bytes
        if free is None:
            found = os.statvfs(parent)
            free = found.f_bavail * found.f_frsize
        if needed + SPARE_BYTES > free:
            raise OServeError(
                f"there is no room for the model: {_gib(needed)} are needed, {_gib(free)} are "
                f"free, of which {_gib(SPARE_BYTES)} stay free",
                place=str(self.place),
                remedy="make room on that disk, or mount the model's folder there",
            )


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder. Raises ConnectionError if another server's examiner has it.

    It may be one that is about to notice that its server has ended.
    """
    with (folder / _LOCK).open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConnectionError("another server has this node fetch the same model") from None
        yield


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0


def _sync(folder: Path) -> None:
    """Have the names in a folder on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _gib(size: float) -> str:
    return f"{size / (1 << 30):.2f} GiB"
