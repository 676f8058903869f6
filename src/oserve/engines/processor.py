"""This machine's processor: its name, and which precisions it computes in without detours.

The only place that asks. ``cluster.cpu_flags`` takes the place of what the system says, so that a
machine can be tried as if it were another.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from oserve.core import Device, OServeError, Precision

AUTO = "auto"
_CPUINFO = Path("/proc/cpuinfo")
# x86 spells them avx512_bf16 and amx_bf16, Arm bf16.
_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
_FLAG = re.compile(r"^[a-z0-9_]+$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Processor:
    """``name`` as the system calls it; ``flags``: instruction sets as /proc/cpuinfo spells them."""

    name: str = "CPU"
    flags: frozenset[str] = frozenset()

    @property
    def has_bf16(self) -> bool:
        """Whether it multiplies in bf16 rather than emulating it."""
        return bool(self.flags & _BF16_FLAGS)


def find_processor(flags: str = AUTO) -> Processor:
    """The machine's, with ``flags`` (separated by spaces or commas) unless they are ``auto``.

    Raises OServeError for what cannot be a flag.
    """
    try:
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = parse_cpuinfo(text)
    if flags.strip() == AUTO:
        return found
    named = flags.replace(",", " ").split()
    for flag in named:
        if flag == AUTO or not _FLAG.match(flag):
            raise OServeError(
                f"{flag!r} is no flag of a processor",
                place="cluster.cpu_flags",
                remedy="auto, or flags as /proc/cpuinfo spells them, such as 'avx2 avx512f'",
            )
    return Processor(name=found.name, flags=frozenset(named))


def parse_cpuinfo(text: str) -> Processor:
    """Of the first core in the text of /proc/cpuinfo; x86 says flags, Arm Features."""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
    return Processor(
        name=name.group(1).strip() if name else "CPU",
        flags=frozenset(flags.group(1).split()) if flags else frozenset(),
    )


def plain_precisions(devices: Sequence[Device], processor: Processor) -> tuple[Precision, ...]:
    """What the model's own checkpoint can be run in, fastest first.

    Without instructions for it, bf16 is slower on a CPU than fp32; with them fp32 still runs.
    """
    if not devices or devices[0].kind != "cpu":
        return (Precision.BF16,)
    return (Precision.BF16, Precision.FP32) if processor.has_bf16 else (Precision.FP32,)
