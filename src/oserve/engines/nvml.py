"""Joules of NVIDIA GPUs by NVML, through nvidia-ml-py (the extra ``gpu``).

``nvmlDeviceGetTotalEnergyConsumption`` counts millijoules of the board since the driver was loaded
(Volta or newer); elsewhere the power is integrated.
"""

import importlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

_log = logging.getLogger("oserve.engines")

# More than any board draws: a larger difference is no energy but a counter that jumped.
_MOST_W = 5000.0
# Each fault is logged once, and no more than so many.
_MOST_SAID = 20


def _pynvml() -> Any:
    return importlib.import_module("pynvml")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reading:
    """The joules counted so far, or the present power of a device that does not count."""

    at_s: float
    energy_j: float | None = None
    power_w: float | None = None

    def since(self, before: "_Reading") -> float | None:
        """Joules from ``before`` on; ``None`` if they do not compare."""
        since_s = self.at_s - before.at_s
        if self.energy_j is not None and before.energy_j is not None:
            joules = self.energy_j - before.energy_j
            return joules if 0 <= joules <= _MOST_W * (since_s + 1.0) else None
        if self.power_w is not None and before.power_w is not None:
            return (self.power_w + before.power_w) / 2 * since_s
        return None


class NvmlCounter:
    """Joules by device. ``load`` returns the module ``pynvml``; devices are named ``gpu:INDEX``."""

    source = "nvml"

    def __init__(self, devices: Sequence[str], *, load: Callable[[], Any] = _pynvml) -> None:
        self._indices = {name: int(name.partition(":")[2]) for name in devices}
        self._load = load
        self._nvml: Any = None
        self._said: set[str] = set()
        self._last: dict[str, _Reading] = {}

    def drawn(self, now_s: float) -> dict[str, float]:
        """Joules by device since the last call; devices that cannot be read are left out."""
        try:
            if self._nvml is None:
                module = self._load()
                module.nvmlInit()
                self._nvml = module
        # NVML's errors are a class of a module that may be missing, and loading can raise others.
        except Exception as error:
            self._failed(error)
            return {}
        found = {}
        for name, index in self._indices.items():
            try:
                joules = self._device(name, index, now_s)
            # As above: the class of NVML's errors is the module's.
            except Exception as error:
                self._last.pop(name, None)
                self._failed(error, name)
                continue
            if joules is not None:
                found[name] = joules
        if not self._last:
            self._nvml = None  # the driver may have been loaded again: initialise once more
        return found

    def _device(self, name: str, index: int, now_s: float) -> float | None:
        """Joules since the last reading; ``None`` without one, or if the counter jumped."""
        handle = self._nvml.nvmlDeviceGetHandleByIndex(index)
        before = self._last.get(name)
        try:
            energy_j = float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3
            now = _Reading(at_s=now_s, energy_j=energy_j)
        except self._nvml.NVMLError:
            power_w = float(self._nvml.nvmlDeviceGetPowerUsage(handle)) / 1e3
            now = _Reading(at_s=now_s, power_w=power_w)
        self._last[name] = now
        return None if before is None else now.since(before)

    def _failed(self, error: Exception, name: str = "") -> None:
        words = f"{name}: {error}" if name else str(error)
        if words not in self._said and len(self._said) < _MOST_SAID:
            self._said.add(words)
            _log.info("NVML gives no energy (%s); the model's figure is used instead", words)
