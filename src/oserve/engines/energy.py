"""The meter of a server: joules of its devices by NVML or RAPL, else by the model.

Counters are read in a thread of their own, since a call into a broken driver may never return. The
meter then goes on with the model's figures. It never raises.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from oserve.control.energy import MODEL, CostsOf, Drawn, EnergyLedger, ModelledEnergy
from oserve.core import Device, Observation
from oserve.engines.dial import LOCAL_NODE
from oserve.engines.nvml import NvmlCounter
from oserve.engines.rapl import POWERCAP, RaplCounter

_log = logging.getLogger("oserve.engines")

_INTERVAL_S = 5.0


class DeviceCounter(Protocol):
    """A counter of joules; ``drawn`` returns those by device since its last call."""

    @property
    def source(self) -> str: ...

    def drawn(self, now_s: float) -> dict[str, float]: ...


def find_counters(devices: Sequence[Device]) -> list[DeviceCounter]:
    """The counters that may exist for these devices on this machine."""
    here = [device for device in devices if device.node == LOCAL_NODE]
    gpus = [device.id for device in here if device.id.startswith("gpu:")]
    slots = [device.id for device in here if device.kind == "cpu"]
    found: list[DeviceCounter] = []
    if gpus:
        found.append(NvmlCounter(gpus))
    if slots and POWERCAP.is_dir():
        found.append(RaplCounter(slots))
    return found


def in_thread(work: Callable[[], None]) -> None:
    """Run it in a thread that does not keep the process from ending."""
    threading.Thread(target=work, name="energy", daemon=True).start()


class EnergyMeter:
    """Enters into ``ledger`` what the devices draw, every few seconds.

    ``costs``: the seconds of a token, for the share of prompts. ``counters`` and ``run`` are for
    tests.
    """

    def __init__(
        self,
        devices: Sequence[Device],
        costs: CostsOf,
        *,
        counters: Sequence[DeviceCounter] | None = None,
        run: Callable[[Callable[[], None]], None] = in_thread,
    ) -> None:
        self.ledger = EnergyLedger()
        self._counters = find_counters(devices) if counters is None else counters
        self._model = ModelledEnergy(costs)
        self._run = run
        self._entered_s: float | None = None
        self._reading = False
        self._late = False
        self._read: dict[str, Drawn] | None = None
        self._failed = False

    def observe(self, observation: Observation) -> dict[str, Any] | None:
        """Take a reading that has ended, begin the next when it is due; see ``document``."""
        try:
            self._advance(observation)
        # An unforeseen fault in metering must not end serving.
        except Exception:
            if not self._failed:
                _log.exception("the energy of an interval is unknown")
            self._failed = True
        return self.ledger.document()

    def _advance(self, observation: Observation) -> None:
        now_s = observation.now_s
        if self._entered_s is None:
            self._enter(observation, {})
        if self._reading and self._read is not None:
            # What a late reading counted has been entered by the model.
            if not self._late:
                self._enter(observation, self._read)
            self._reading, self._late, self._read = False, False, None
        elif self._reading and now_s - (self._entered_s or 0.0) >= 2 * _INTERVAL_S:
            self._late = True
            self._enter(observation, {})
        if not self._reading and now_s - (self._entered_s or 0.0) >= _INTERVAL_S:
            if self._counters:
                self._reading = True
                self._run(self._count)
            else:
                self._enter(observation, {})

    def _enter(self, observation: Observation, measured: Mapping[str, Drawn]) -> None:
        modelled = {
            name: Drawn(source=MODEL, joules=joules)
            for name, joules in self._model.observe(observation).items()
        }
        self.ledger.add(observation, modelled | dict(measured))
        self._entered_s = observation.now_s

    def _count(self) -> None:
        """Read the counters; runs in its thread."""
        read: dict[str, Drawn] = {}
        now_s = time.monotonic()
        try:
            for counter in self._counters:
                for name, joules in counter.drawn(now_s).items():
                    read[name] = Drawn(source=counter.source, joules=joules)
        finally:
            self._read = read
