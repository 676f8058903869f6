"""Joules of the processor packages by RAPL, from the kernel's powercap files.

They hold for the whole machine, other programs included, and are spread evenly over the devices.
Only packages are added: their sub-domains (cores, graphics) are part of them, and the platform
domain (psys) contains them. Memory that servers count apart is left out. Since Linux 5.10 the files
belong to root.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

_log = logging.getLogger("oserve.engines")

POWERCAP = Path("/sys/class/powercap")
# More than any package draws: a larger difference is a counter that started anew.
_MOST_W = 2000.0
# Each fault is logged once, and no more than so many.
_MOST_SAID = 20


class RaplCounter:
    """Joules of the machine's packages, spread over ``devices``; ``root`` is for tests."""

    source = "rapl"

    def __init__(self, devices: Sequence[str], *, root: Path = POWERCAP) -> None:
        self._devices = tuple(devices)
        self._root = root
        self._said: set[str] = set()
        self._last_s = 0.0
        # Microjoules by package.
        self._last: dict[Path, int] = {}

    def drawn(self, now_s: float) -> dict[str, float]:
        """Joules by device since the last call; nothing if a package cannot be read."""
        since_s, before = now_s - self._last_s, self._last
        self._last_s, self._last = now_s, {}
        try:
            present = {zone: _number(zone / "energy_uj") for zone in _packages(self._root)}
            joules = [_used_j(zone, before[zone], present[zone], since_s) for zone in before]
        except (OSError, ValueError, KeyError) as error:
            self._failed(error)
            return {}
        self._last = present
        known = [item for item in joules if item is not None]
        if not before or before.keys() != present.keys() or len(known) < len(before):
            return {}
        return {name: sum(known) / len(self._devices) for name in self._devices}

    def _failed(self, error: Exception) -> None:
        words = str(error)
        if words not in self._said and len(self._said) < _MOST_SAID:
            self._said.add(words)
            _log.info("RAPL gives no energy (%s); the model's figure is used instead", words)


def _packages(root: Path) -> list[Path]:
    """The folders of packages; sub-domains have a second colon. Raises ValueError without any."""
    zones = [
        zone
        for zone in sorted(root.glob("intel-rapl:*"))
        if zone.name.count(":") == 1
        and (zone / "name").read_text(encoding="utf-8").startswith("package")
    ]
    if not zones:
        raise ValueError(f"{root} has no package domain")
    return zones


def _number(file: Path) -> int:
    return int(file.read_text(encoding="utf-8"))


def _used_j(zone: Path, before: int, after: int, since_s: float) -> float | None:
    """Joules between two readings of a counter that wraps; ``None`` if it started anew."""
    used = after - before
    if used < 0:
        used += _number(zone / "max_energy_range_uj")
    joules = used / 1e6
    return joules if 0 <= joules <= _MOST_W * (since_s + 1.0) else None
