"""Seeded series of counts that tests and the choice of constants share."""

import math

import numpy as np

from oserve.traces.mixes import mix_shares
from oserve.workload.columns import Floats

BASE = np.array([10.0, 60.0, 150.0, 300.0])


def drawn(
    rng: np.random.Generator, rate: Floats, dispersion: float = 0.0, parts: int = 6
) -> Floats:
    """Counts (n, parts, k) of rates a window (n, k), Poisson or gamma-mixed by the window."""
    n, k = rate.shape
    at = np.arange(n * parts) / parts
    fine = np.stack([np.interp(at, np.arange(n) + 0.5, rate[:, kind]) for kind in range(k)], axis=1)
    if dispersion:
        fine *= np.repeat(rng.gamma(1 / dispersion, dispersion, (n, k)), parts, axis=0)
    return rng.poisson(np.maximum(fine / parts, 0.0)).reshape(n, parts, k).astype(np.float64)


def mix(seed: int, windows: int, change_period_s: float, mix_cv: float = 0.544) -> Floats:
    """Five hundred requests a minute of four types whose mix turns."""
    shares = [
        mix_shares(60 * (place + 0.5), types=4, mix_cv=mix_cv, change_period_s=change_period_s)
        for place in range(windows)
    ]
    return drawn(np.random.default_rng(seed), 500 * np.array(shares))


def flat(seed: int, windows: int, dispersion: float = 0.0) -> Floats:
    return drawn(np.random.default_rng(seed), np.tile(BASE, (windows, 1)), dispersion)


def walk(seed: int, windows: int, step: float = 0.1, dispersion: float = 0.0) -> Floats:
    rng = np.random.default_rng(seed)
    steps = rng.normal(0, step, (windows, 4))
    # Back to the middle slowly, so that a long one stays in range.
    level = np.zeros((windows, 4))
    for place in range(1, windows):
        level[place] = 0.98 * level[place - 1] + steps[place]
    return drawn(rng, BASE * np.exp(level), dispersion)


def bursts(seed: int, windows: int) -> Floats:
    """All types burst together, every five or six windows."""
    rng = np.random.default_rng(seed)
    phase = np.cumsum(rng.normal(1, 0.15, windows))
    shape = np.maximum(0, np.cos(2 * np.pi * phase / 5.5)) ** 2
    return drawn(rng, BASE * (0.1 + 2 * shape[:, None]), 0.1)


def steps(seed: int, windows: int) -> Floats:
    rng = np.random.default_rng(seed)
    level = np.ones((windows, 4))
    for kind in range(4):
        now = 1.0
        for place in range(windows):
            if rng.random() < 0.05:
                now = math.exp(rng.normal(0, 0.8))
            level[place, kind] = now
    return drawn(rng, BASE * level, 0.01)
