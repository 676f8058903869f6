"""Learns from switches how far their phases were from the prediction, and scales the next one.

The constants of ``SwitchCosts`` come from other machines, and idle ones; an engine starts twice as
slowly beside others that serve. Pure: durations come in, factors go out.
"""

from collections.abc import Mapping
from dataclasses import fields, replace
from math import exp, log

from oserve.switch.costs import PhaseSeconds

# Weight of the last switch, once there was an earlier one.
_LEARNING_RATE = 0.5
# A shorter phase tells nothing.
_LEAST_S = 0.05
# Bound of a factor, and of its inverse.
_MOST_FACTOR = 30.0
_LEARNED = tuple(field.name for field in fields(PhaseSeconds) if field.name != "room_s")


class LearnedPhases:
    """Factors by phase, 1 before the first switch; making room is not learned."""

    def __init__(self) -> None:
        self._logs: dict[str, float] = {}

    def factor(self, phase: str) -> float:
        """Return the factor of ``prepare``, ``transfer``, ``verify``, ``commit`` or ``drain``."""
        return exp(self._logs.get(f"{phase}_s", 0.0))

    def scaled(self, phases: PhaseSeconds) -> PhaseSeconds:
        """Return a prediction with all that was learned."""
        return replace(
            phases,
            **{
                name: getattr(phases, name) * exp(factor)
                for name, factor in self._logs.items()
                if name in _LEARNED
            },
        )

    def observe(self, predicted: PhaseSeconds, took_s: Mapping[str, float]) -> None:
        """Learn from the seconds of phases, by name; ``predicted`` was scaled at the time."""
        for phase, seconds in took_s.items():
            name = f"{phase}_s"
            wanted_s = getattr(predicted, name) if name in _LEARNED else 0.0
            if wanted_s < _LEAST_S or seconds < _LEAST_S:
                continue
            rate = _LEARNING_RATE if name in self._logs else 1.0
            found = self._logs.get(name, 0.0) + rate * log(seconds / wanted_s)
            most = log(_MOST_FACTOR)
            self._logs[name] = min(most, max(-most, found))

    def state(self) -> dict[str, float]:
        """Return JSON values for ``restore``."""
        return dict(self._logs)

    def restore(self, state: Mapping[str, float]) -> None:
        """Continue from ``state``; unknown names are ignored."""
        self._logs = {name: float(state[name]) for name in _LEARNED if name in state}
