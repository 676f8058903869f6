"""How long things take in a simulated cluster, and what goes wrong there."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Phases:
    """Seconds: from a start to a process that can load, for its weights, for its warm-up.

    ``stop_s`` is how long a stopped replica's devices stay taken. Draining takes as long as its
    requests do.
    """

    start_s: float = 0.0
    load_s: float = 4.0
    warm_s: float = 0.0
    stop_s: float = 0.0

    @property
    def ready_s(self) -> float:
        """From the start to the first request."""
        return self.start_s + self.load_s + self.warm_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """Chances in [0, 1], drawn from one seeded generator, and crashes at set times.

    Per action: that it is lost, or done twice. Per start: that it fails, or takes ``slow_factor``
    times as long. Per observation: that it is the one before. ``crashes`` are (seconds, replica).
    ``replay``: requests of a crashed replica start over elsewhere; otherwise they are lost.
    """

    lost_action: float = 0.0
    repeated_action: float = 0.0
    failed_start: float = 0.0
    slow_start: float = 0.0
    slow_factor: float = 4.0
    stale_observation: float = 0.0
    crashes: tuple[tuple[float, str], ...] = ()
    replay: bool = True
    seed: int = 0
