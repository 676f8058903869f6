"""CPU contention: processor time that other processes use during a measurement."""

import os
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
# Fields of the first line of /proc/stat that are not idle: user, nice, system, then irq to steal.
_BUSY = (0, 1, 2, 5, 6, 7)


def foreign_cpu_s() -> float | None:
    """CPU seconds used so far by processes that do not descend from this one.

    Only differences mean something. ``None`` if the system does not report it (it is not Linux).
    """
    try:
        fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
        busy = sum(int(fields[index]) for index in _BUSY)
    except (OSError, ValueError, IndexError):
        return None
    return (busy - _own_ticks()) / _TICKS_PER_S


def _own_ticks() -> int:
    """Clock ticks of this process and its running descendants."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            text = Path(f"/proc/{entry}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        # The command in parentheses may contain anything, so fields count from its end.
        fields = text.rpartition(")")[2].split()
        parents[int(entry)] = int(fields[1])
        ticks[int(entry)] = int(fields[11]) + int(fields[12])
    own = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in own} - own:
        own |= more
    return sum(ticks.get(pid, 0) for pid in own)
