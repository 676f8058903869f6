"""The energy of the devices: what the model says they drew, and a ledger of what was drawn.

A device serves while a replica's process holds it: loading, standby, ready, draining or hung.
Without a process it is idle. Counters of devices are read by the shell.
"""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from oserve.core import EngineWork, Observation, OServeError, ReplicaPhase, ReplicaState
from oserve.perf import TokenCosts
from oserve.perf.device import PowerFacts, find_device
from oserve.perf.power import ReplicaWork, replica_power_w, work_between

CostsOf = Callable[..., TokenCosts]
"""Token costs by shape and kind of device."""

MODEL = "model"
# Joules per token are a ratio over so long.
_WINDOW_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """Joules of one device, and which counter says so."""

    source: str
    joules: float


def held_devices(observation: Observation) -> frozenset[str]:
    """The devices that a replica's process holds."""
    states = (s for s in observation.replicas if s.phase is not ReplicaPhase.GONE)
    return frozenset(device for state in states for device in state.spec.devices)


class ModelledEnergy:
    """Joules by device from the facts of its kind and the counters of engines.

    Between two observations it equals the simulator's energy for the same work. Devices of a kind
    without facts are left out.
    """

    def __init__(self, costs: CostsOf) -> None:
        self._costs = costs
        self._last_s: float | None = None
        self._work: dict[tuple[str, float], EngineWork] = {}
        # Counters of engines are some tenths of a second old, so an interval can count more busy
        # time than it has; the rest belongs to the next.
        self._over_s: dict[tuple[str, float], float] = {}

    def observe(self, observation: Observation) -> dict[str, float]:
        """Joules by device since the last call; nothing at the first."""
        since_s = 0.0 if self._last_s is None else observation.now_s - self._last_s
        self._last_s = observation.now_s
        kinds = {device.id: device.kind for device in observation.devices}
        drawn = {name: power.idle_w * since_s for name, power in _powers(kinds).items()}
        present: dict[tuple[str, float], EngineWork] = {}
        over_s: dict[tuple[str, float], float] = {}
        for state in observation.replicas:
            names = state.spec.devices
            if state.phase is ReplicaPhase.GONE or not all(name in drawn for name in names):
                continue
            key = (state.spec.id, state.started_s)
            work = self._done(key, state)
            used_s = min(since_s, work.busy_s)
            over_s[key] = min(since_s, work.busy_s - used_s)
            if state.work is not None:
                present[key] = state.work
            for name in names:
                kind = kinds[name]
                shape = replace(state.spec.shape, device_kind=kind)
                power, costs = find_device(kind).power, self._costs(shape, kind)
                done = replace(work, busy_s=used_s)
                watts = replica_power_w(power, costs, shape, done, since_s) / shape.device_count
                drawn[name] = watts * since_s
        self._work, self._over_s = present, over_s
        return drawn

    def _done(self, key: tuple[str, float], state: ReplicaState) -> ReplicaWork:
        """What a replica did since it was last observed, with the busy time left over."""
        before = self._work.get(key)
        if before is None or state.work is None:
            return ReplicaWork()
        work = work_between(before, state.work, state.spec.shape)
        return replace(work, busy_s=work.busy_s + self._over_s.get(key, 0.0))


def _powers(kinds: Mapping[str, str]) -> dict[str, PowerFacts]:
    """Power facts by device; devices of an unknown kind are left out."""
    found: dict[str, PowerFacts] = {}
    for name, kind in kinds.items():
        try:
            found[name] = find_device(kind).power
        except OServeError:
            continue
    return found


class EnergyLedger:
    """Adds up joules by source and by whether the device served, and tokens beside them."""

    def __init__(self) -> None:
        self._joules: dict[tuple[str, str], float] = {}
        self._tokens = 0
        self._counted: dict[tuple[str, float], int] = {}
        # (time, joules of serving devices, tokens) after each entry.
        self._past: deque[tuple[float, float, int]] = deque()
        self._power_w: dict[str, float] = {}
        self._sources: tuple[str, ...] = ()

    def add(self, observation: Observation, drawn: Mapping[str, Drawn]) -> None:
        """Enter what the devices drew since the last entry."""
        now_s, held = observation.now_s, held_devices(observation)
        sums = {"serving": 0.0, "idle": 0.0}
        for device, item in drawn.items():
            state = "serving" if device in held else "idle"
            key = (item.source, state)
            self._joules[key] = self._joules.get(key, 0.0) + item.joules
            sums[state] += item.joules
        self._tokens += self._generated(observation)
        serving = self._past[-1][1] if self._past else 0.0
        if self._past and now_s > self._past[-1][0]:
            since_s = now_s - self._past[-1][0]
            self._power_w = {state: joules / since_s for state, joules in sums.items()}
            self._sources = tuple(sorted({item.source for item in drawn.values()}))
        self._past.append((now_s, serving + sums["serving"], self._tokens))
        while len(self._past) > 2 and self._past[1][0] <= now_s - _WINDOW_S:
            self._past.popleft()

    def _generated(self, observation: Observation) -> int:
        """Tokens that engines generated since the last entry."""
        counted: dict[tuple[str, float], int] = {}
        tokens = 0
        for state in observation.replicas:
            if state.work is None or not state.spec.devices:
                continue
            key = (state.spec.id, state.started_s)
            counted[key] = state.work.output_tokens
            tokens += max(0, counted[key] - self._counted.get(key, counted[key]))
        self._counted = counted
        return tokens

    @property
    def joules_per_output_token(self) -> float | None:
        """Of serving devices, over the last minutes; ``None`` without tokens."""
        if not self._past:
            return None
        (_, first_j, first), (_, last_j, last) = self._past[0], self._past[-1]
        return (last_j - first_j) / (last - first) if last > first else None

    def counters(self) -> dict[str, dict[str, list[float]]]:
        """The counter of joules, as ``gateway.metrics`` has counters."""
        return {
            "oserve_energy_joules": {
                f"{source}\t{state}": [joules] for (source, state), joules in self._joules.items()
            }
        }

    def gauges(self) -> list[tuple[str, list[str], float]]:
        """Joules per output token, where there are any, as (metric, labels, value)."""
        ratio = self.joules_per_output_token
        return [] if ratio is None else [("oserve_joules_per_output_token", [], ratio)]

    def document(self) -> dict[str, Any] | None:
        """JSON values for the status document; ``None`` before anything is known."""
        if not self._power_w or not self._sources:
            return None
        ratio = self.joules_per_output_token
        return {
            "power_w": round(self._power_w["serving"], 1),
            "idle_power_w": round(self._power_w["idle"], 1),
            "joules_per_output_token": None if ratio is None else round(ratio, 4),
            "sources": list(self._sources),
            "joules": {
                f"{source} {state}": round(joules, 1)
                for (source, state), joules in sorted(self._joules.items())
            },
        }
