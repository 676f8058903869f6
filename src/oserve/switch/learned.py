"""How long the phases of switches took against what was predicted: what the next one is scaled by.

The constants of ``SwitchCosts`` are of other machines and quiet ones; an engine starts twice as
slowly beside others that serve. Pure: durations come in, factors go out.
"""

from collections.abc import Mapping
from dataclasses import fields, replace
from math import exp, log

from oserve.switch.costs import PhaseSeconds

# How much the last switch counts, once there was one.
_LEARNING_RATE = 0.5
# A phase that was over at once, or hung, says little about the next.
_LEAST_S = 0.05
_MOST_FACTOR = 30.0
_LEARNED = tuple(field.name for field in fields(PhaseSeconds) if field.name != "room_s")


class LearnedPhases:
    """Factors by phase, 1 before anything was seen; draining is learned, making room is not."""

    def __init__(self) -> None:
        self._logs: dict[str, float] = {}

    def factor(self, phase: str) -> float:
        """Of ``prepare``, ``transfer``, ``verify``, ``commit`` or ``drain``."""
        return exp(self._logs.get(f"{phase}_s", 0.0))

    def scaled(self, phases: PhaseSeconds) -> PhaseSeconds:
        """A prediction with all that was learned."""
        return replace(
            phases,
            **{
                name: getattr(phases, name) * exp(factor)
                for name, factor in self._logs.items()
                if name in _LEARNED
            },
        )

    def observe(self, predicted: PhaseSeconds, took_s: Mapping[str, float]) -> None:
        """Take in how long phases took, by name; ``predicted`` was scaled by what was known."""
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
        """Plain data that ``restore`` takes."""
        return dict(self._logs)

    def restore(self, state: Mapping[str, float]) -> None:
        """Go on where ``state`` was taken; names that are not known are left out."""
        self._logs = {name: float(state[name]) for name in _LEARNED if name in state}
