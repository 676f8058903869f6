"""Main memory that engines can use: of the machine, or of the control groups that they are in.

The limit of a group, and of each group around it, holds for all its processes together. Its usage
includes file pages that the kernel can drop; they count as free, as in ``MemAvailable``. Versions 1
and 2 of control groups have the same figures under different names.
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_GROUPS = "sys/fs/cgroup"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Names:
    folder: str
    bound: str
    used: str
    droppable: str


_SECOND = _Names(folder="", bound="memory.max", used="memory.current", droppable="inactive_file")
_FIRST = _Names(
    folder="memory",
    bound="memory.limit_in_bytes",
    used="memory.usage_in_bytes",
    droppable="total_inactive_file",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """The limit of one control group, and the memory of its processes that cannot be dropped."""

    bound_bytes: int
    held_bytes: int


def total_memory_bytes(root: Path = Path("/")) -> int:
    """The machine's memory, or the smallest limit of this process's control groups."""
    total = _meminfo(root, "MemTotal")
    return min([total, *(group.bound_bytes for group in _groups(root))])


def available_memory_bytes(root: Path = Path("/")) -> int:
    """Memory that new processes may use, of the machine or of this process's control groups."""
    free = _meminfo(root, "MemAvailable")
    return max(0, min([free, *(group.bound_bytes - group.held_bytes for group in _groups(root))]))


def _meminfo(root: Path, name: str) -> int:
    text = (root / "proc/meminfo").read_text(encoding="ascii")
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found.group(1)) * 1024 if found else 0


def _groups(root: Path) -> Iterator[_Group]:
    """The control groups of this process that have a limit, innermost first."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        names = _FIRST if controllers else _SECOND
        top = root / _GROUPS / names.folder
        own = top / path.strip("/")
        # In a container the path may be that of the host, of which only the top is visible.
        for folder in (own, *own.parents):
            if not folder.is_relative_to(top):
                break
            group = _read(folder, names)
            if group is not None:
                yield group


def _read(folder: Path, names: _Names) -> _Group | None:
    with contextlib.suppress(OSError, ValueError):
        bound = int((folder / names.bound).read_text(encoding="ascii"))
        used = int((folder / names.used).read_text(encoding="ascii"))
        stat = (folder / "memory.stat").read_text(encoding="ascii")
        found = re.search(rf"^{names.droppable} (\d+)$", stat, re.MULTILINE)
        return _Group(bound_bytes=bound, held_bytes=used - (int(found[1]) if found else 0))
    return None
