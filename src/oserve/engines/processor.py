"""This machine's processor: its name, and the precisions that it computes in directly.

No other module reads it. ``cluster.cpu_flags`` replaces the flags that the system reports, to try a
configuration for another machine.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from oserve.core import Device, OServeError, Precision

AUTO = "auto"
BF16_FLAG = "avx512_bf16"
_CPUINFO = Path("/proc/cpuinfo")
# x86 spells them avx512_bf16 and amx_bf16, Arm bf16.
_BF16_FLAGS = frozenset({BF16_FLAG, "amx_bf16", "bf16"})
_FLAG = re.compile(r"^[a-z0-9_]+$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Processor:
    """``name`` as the system reports it; ``flags``: instruction sets as in /proc/cpuinfo."""

    name: str = "CPU"
    flags: frozenset[str] = frozenset()

    @property
    def has_bf16(self) -> bool:
        """Whether it has instructions for bf16, which is otherwise emulated."""
        return bool(self.flags & _BF16_FLAGS)


def find_processor(flags: str = AUTO) -> Processor:
    """The machine's processor, with ``flags`` (separated by spaces or commas) unless ``auto``.

    Raises OServeError for a word that cannot be a flag.
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
                f"{flag!r} is not a processor flag",
                place="cluster.cpu_flags",
                remedy="give auto, or flags as in /proc/cpuinfo, such as 'avx2 avx512f'",
            )
    return Processor(name=found.name, flags=frozenset(named))


def parse_cpuinfo(text: str) -> Processor:
    """The first core in the text of /proc/cpuinfo; x86 has flags, Arm Features."""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
    return Processor(
        name=name.group(1).strip() if name else "CPU",
        flags=frozenset(flags.group(1).split()) if flags else frozenset(),
    )


def plain_precisions(devices: Sequence[Device], processor: Processor) -> tuple[Precision, ...]:
    """The precisions in which the model's own checkpoint can run, fastest first.

    On a CPU without instructions for bf16, it is slower than fp32 and is left out.
    """
    if not devices or devices[0].kind != "cpu":
        return (Precision.BF16,)
    return (Precision.BF16, Precision.FP32) if processor.has_bf16 else (Precision.FP32,)
