"""How bursty traffic is, from counts of arrivals in short pieces of time."""

import numpy as np

from oserve.control.evaluation import TypeRates
from oserve.workload.columns import Floats

# Fewer pieces tell nothing; more than the most is hardly a rate any more.
_FEWEST_PIECES, _MOST_BURSTY = 18, 2.0
# Variation that is slower than so many pieces is a trend.
_BURST_LAG = 6


def burstiness_of(counts: Floats) -> TypeRates:
    """The variance of the rate between pieces beyond chance, relative, by type.

    ``counts``: (p, k), arrivals of k types in p pieces, NaN in gaps. Half the mean squared
    difference of pieces that are some way apart is a variance without the trend.
    """
    kinds: int = counts.shape[1]
    counts = counts[np.isfinite(counts).all(axis=1)]
    if len(counts) < _FEWEST_PIECES:
        return (0.0,) * kinds
    mean = np.maximum(counts.mean(axis=0), 1e-9)
    steps = counts[_BURST_LAG:] - counts[:-_BURST_LAG]
    beyond = (steps**2).mean(axis=0) / 2.0 - mean
    relative: Floats = np.clip(beyond / mean**2, 0.0, _MOST_BURSTY)
    found: tuple[float, ...] = tuple(relative.tolist())
    return found
