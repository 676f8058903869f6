"""The history of a forecaster under new workload types.

If the requests are available, count them again: assign them to the new types, ``arrival_rates``,
and ``replayed``. From counts alone, ``mapped`` adds those of each old type to the new type with the
nearest centre (``nearest_types``), which preserves the total of every window. A new type without an
old one starts from zeros.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from oserve.forecast.forecaster import Forecaster
from oserve.workload.columns import Floats, Indices
from oserve.workload.model import nearest


def nearest_types(old_centres: npt.ArrayLike, new_centres: npt.ArrayLike) -> Indices:
    """For each old type, the new type with the nearest centre (log1p prompt, log1p output).

    Centres are (k, 2); the result is (old k,).
    """
    old = np.asarray(old_centres, dtype=np.float64)
    return nearest(old, np.asarray(new_centres, dtype=np.float64))


def mapped(history: Floats, goes_to: npt.ArrayLike, k: int) -> Floats:
    """Map counts (n, old k) to ``k`` new types, (n, k): old type i to ``goes_to[i]``.

    A missing count (NaN) makes that of its new type missing.
    """
    target = np.asarray(goes_to, dtype=np.intp)
    if target.shape != history.shape[1:] or (target < 0).any() or (target >= k).any():
        raise ValueError(f"types {target.tolist()} of {k} for {history.shape[1]}")
    found = np.zeros((len(history), k))
    for old, new in enumerate(target):
        found[:, new] += history[:, old]
    return found


def saved_history(state: Mapping[str, Any]) -> Floats:
    """The windows in the ``state`` of a forecaster of any types, (n, k), oldest first."""
    ring = state["_history"]
    rows = ring["_rows"]
    values = [np.nan if value is None else value for value in rows["values"]]
    table = np.array(values, dtype=np.float64).reshape(rows["shape"])
    seen = int(ring["_seen"])
    history: Floats = table[np.arange(max(0, seen - len(table)), seen) % len(table)]
    return history


def replayed(forecaster: Forecaster, history: Floats) -> Forecaster:
    """Feed a fresh forecaster the counts (n, k), oldest first, and return it.

    Takes n updates: seconds for a thousand windows.
    """
    for row in history:
        forecaster.update(row)
    return forecaster
