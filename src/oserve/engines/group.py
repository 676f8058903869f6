"""The processes of one engine as a process group, which its API server leads.

vLLM runs several processes. Ending the first is not enough, and ending all at once also ends the
helper that frees their shared memory. Engines share one session: Linux divides CPU time between
sessions first (``sched_autogroup_enabled``), so that priorities have no effect across sessions and
a busy engine starves one that starts. Linux only. It does not import vLLM.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import time
from pathlib import Path

from oserve.control.progress import Activity

CACHES_FOLDER = "caches"
"""The folder for KV caches that move, beside the folders of engines, whose names end in numbers."""

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
SHARED_MEMORY_PREFIX = "psm_oserve_"
_SHARED_MEMORY = "/dev/shm"
# States of threads: stopped by a signal or by a debugger; in a call that no signal interrupts.
_STOPPED = {"T", "t"}
_BLOCKED = "D"
# Bytes that a process has read and written by system calls, and read from disks.
_MOVED = ("rchar", "wchar", "read_bytes")
_POLL_S = 0.02
_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent(number: int = signal.SIGKILL, parent: int | None = None) -> None:
    """Have the kernel send this process signal ``number`` when its parent ends.

    ``parent``: the expected parent; if it has ended already, this process gets the signal now.
    """
    _libc.prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), number)


def fork_group() -> int:
    """Fork; before either process continues, the child leads a process group. 0 in the child.

    The parent may signal the group as soon as this returns.
    """
    heard, told = os.pipe()
    pid = os.fork()
    if pid:
        os.close(told)
        # The child closes its end, at the latest when it ends.
        os.read(heard, 1)
        os.close(heard)
        return pid
    os.close(heard)
    os.setpgid(0, 0)
    os.close(told)
    return 0


def start_ticks(pid: int) -> int:
    """When a process started, in clock ticks since boot; 0 if there is none or it has ended.

    With ``boot_id`` it tells a process from a later one with the same id.
    """
    with contextlib.suppress(OSError, IndexError, ValueError):
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        fields = text.rpartition(")")[2].split()
        return 0 if fields[0] in {"Z", "X"} else int(fields[19])
    return 0


def boot_id() -> str:
    """An id of this boot of the machine; empty if the kernel does not tell."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return ""


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent has ended, so that they can be reaped."""
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def group_members(group: int) -> list[int]:
    """Ids of the group's processes that have not ended; no zombies."""
    members = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError):
                text = Path(f"/proc/{entry}/stat").read_text(encoding="utf-8", errors="replace")
                # The command in brackets may hold any character, so count from its end.
                fields = text.rpartition(")")[2].split()
                if int(fields[2]) == group and fields[0] not in {"Z", "X"}:
                    members.append(int(entry))
    return members


def signal_group(group: int, number: int, *, spare_tracker: bool = False) -> None:
    """Send a signal to every process of the group.

    ``spare_tracker``: leave out Python's resource tracker, which frees the shared memory of the
    other processes once they have ended, and then ends by itself.
    """
    for pid in group_members(group):
        if spare_tracker and _is_tracker(pid):
            continue
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def end_group(group: int, *, grace_s: float) -> None:
    """End a group: TERM, after ``grace_s`` seconds KILL; returns when it is empty.

    Blocks for at most a few seconds more than ``grace_s``, and reaps children of the caller.
    """
    segments = group_segments(group)
    if grace_s > 0:
        signal_group(group, signal.SIGTERM)
    if grace_s <= 0 or not _await_empty(group, grace_s):
        signal_group(group, signal.SIGKILL, spare_tracker=True)
        if not _await_empty(group, 2.0):
            signal_group(group, signal.SIGKILL)
            _await_empty(group, 2.0)
    for path in segments:
        with contextlib.suppress(OSError):
            os.unlink(path)


def release_leftovers(group: int, folder: str) -> None:
    """Free the shared memory and the temporary ``folder`` of a group that has ended.

    When vLLM ends it kills its own helpers, among them the one that would free the memory.
    """
    prefixes = [f"{SHARED_MEMORY_PREFIX}{group}_"]
    if folder and os.path.isdir(folder):
        # Ranks name their shared memory after the file by which they rendezvous.
        prefixes += [name for name in os.listdir(folder) if name.startswith("vllm_dist_")]
        shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        for entry in os.listdir(_SHARED_MEMORY):
            if entry.startswith(tuple(prefixes)):
                with contextlib.suppress(OSError):
                    os.unlink(f"{_SHARED_MEMORY}/{entry}")


def remove_if_unused(folder: str) -> None:
    """Remove the parent folder of engines' folders if only the folder for caches is left in it."""
    with contextlib.suppress(OSError):
        if set(os.listdir(folder)) <= {CACHES_FOLDER}:
            shutil.rmtree(folder, ignore_errors=True)


def group_segments(group: int) -> set[str]:
    """Shared memory files that processes of the group have mapped."""
    found = set()
    for pid in group_members(group):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines():
                path = line.rpartition(" ")[2]
                if path.startswith((f"{_SHARED_MEMORY}/psm_", f"{_SHARED_MEMORY}/vllm_dist_")):
                    found.add(path)
    return found


def group_activity(group: int, log: Path | None = None) -> Activity | None:
    """The activity of a group's processes, ``None`` without any. ``log``: where they write."""
    stopped, blocked, work_ns, moved = 0, False, 0, 0
    members = group_members(group)
    for pid in members:
        with contextlib.suppress(OSError, IndexError, ValueError):
            states = [
                _thread(f"/proc/{pid}/task/{name}") for name in os.listdir(f"/proc/{pid}/task")
            ]
            stopped += any(state in _STOPPED for state, _ in states)
            blocked = blocked or any(state == _BLOCKED for state, _ in states)
            work_ns += sum(own_ns for _, own_ns in states)
        with contextlib.suppress(OSError, IndexError, ValueError):
            text = Path(f"/proc/{pid}/io").read_text(encoding="ascii")
            lines = dict(line.split(": ") for line in text.splitlines())
            moved += sum(int(lines[name]) for name in _MOVED)
    if log is not None:
        with contextlib.suppress(OSError):
            moved += log.stat().st_size
    if not members:
        return None
    return Activity(stopped=stopped, blocked=blocked, work_s=work_ns / 1e9, moved=moved)


def _thread(folder: str) -> tuple[str, int]:
    """A thread's state, and nanoseconds in which it ran or waited for a processor."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        text = Path(f"{folder}/stat").read_text(encoding="utf-8", errors="replace")
        fields = text.rpartition(")")[2].split()
        with contextlib.suppress(OSError, IndexError, ValueError):
            ran, waited, *_ = Path(f"{folder}/schedstat").read_text(encoding="ascii").split()
            return fields[0], int(ran) + int(waited)
        # Without CONFIG_SCHEDSTATS there are only clock ticks.
        ticks = int(fields[11]) + int(fields[12])
        return fields[0], ticks * 1_000_000_000 // os.sysconf("SC_CLK_TCK")
    return "", 0


def _await_empty(group: int, limit_s: float) -> bool:
    end_s = time.monotonic() + limit_s
    while group_members(group):
        if time.monotonic() >= end_s:
            return False
        time.sleep(_POLL_S)
    return True


def _is_tracker(pid: int) -> bool:
    try:
        return b"resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
