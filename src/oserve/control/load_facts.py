"""What is known of the traffic when a controller looks for a place on the ladder."""

from dataclasses import dataclass

LoadRates = tuple[float, ...]
"""Requests/s of each workload type."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadFacts:
    """Rates by type.

    ``now``: over two intervals; ``last``: over the last ``last_s`` seconds. ``expected`` and
    ``upper``: means and upper quantiles of the forecast, by step of ``step_s`` seconds. ``peaks``:
    rates over pieces of the time that counts for a fall. ``mix``: over ``mix_s`` seconds.
    ``burstiness``, by type: the relative variance of the rate between pieces of ten seconds.
    ``watched_s``: for how long requests were counted. ``wait_s``: about how long a request that
    arrives now waits for a replica; ``None`` if that is unknown.
    """

    now: LoadRates
    last: LoadRates
    last_s: float
    expected: tuple[LoadRates, ...]
    upper: tuple[LoadRates, ...]
    step_s: float
    peaks: tuple[LoadRates, ...]
    mix: LoadRates
    mix_s: float
    burstiness: tuple[float, ...]
    watched_s: float
    wait_s: float | None = None
