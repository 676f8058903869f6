"""Saving and restoring the state of models as plain data.

The shape of each array of a model is fixed, so a state is bounded and its shape can be checked. NaN
is written as null, which JSON and msgpack can represent.
"""

import math
from typing import Any, ClassVar

import numpy as np

from oserve.core import OServeError

PlainState = dict[str, Any]
"""Numbers, strings, null, lists and mappings of these, which msgspec and json encode directly."""


class Stateful:
    """Saves the attributes in ``_saved``: arrays, numbers, Stateful objects and lists of these."""

    _saved: ClassVar[tuple[str, ...]] = ()

    def state(self) -> PlainState:
        """A copy of the state."""
        return {name: _plain(getattr(self, name)) for name in self._saved}

    def restore(self, state: PlainState) -> None:
        """Restore ``state``. Raises OServeError if it is of another kind or shape of model."""
        for name in self._saved:
            if not isinstance(state, dict) or name not in state:
                raise unfit(f"{name} is missing")
            now, saved = getattr(self, name), state[name]
            if isinstance(now, Stateful):
                now.restore(saved)
            elif isinstance(now, list):
                if not isinstance(saved, list) or len(saved) != len(now):
                    raise unfit(f"{name} is not a list of {len(now)}")
                for item, its in zip(now, saved, strict=True):
                    item.restore(its)
            else:
                setattr(self, name, _value(name, saved, now))


def unfit(reason: str) -> OServeError:
    """The error for a state that does not fit this forecaster."""
    return OServeError(
        reason, place="forecast state", remedy="use the state of a forecaster made alike, or none"
    )


def _plain(value: Any) -> Any:
    if isinstance(value, Stateful):
        return value.state()
    if isinstance(value, list):
        return [item.state() for item in value]
    if isinstance(value, np.ndarray):
        numbers = value.ravel().tolist()
        return {
            "shape": list(value.shape),
            "values": [None if math.isnan(number) else number for number in numbers],
        }
    return value


def _value(name: str, saved: Any, now: Any) -> Any:
    if not isinstance(now, np.ndarray):
        if isinstance(saved, bool) or not isinstance(saved, (int, float)):
            raise unfit(f"{name} is no number")
        return type(now)(saved)
    try:
        shape = tuple(saved["shape"])
        numbers = [np.nan if number is None else number for number in saved["values"]]
        array = np.array(numbers, dtype=now.dtype).reshape(shape)
    except (KeyError, TypeError, ValueError):
        raise unfit(f"{name} is no array of numbers") from None
    if shape != now.shape:
        raise unfit(f"{name} has shape {shape}, not {now.shape}")
    return array
