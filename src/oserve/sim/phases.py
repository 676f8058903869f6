"""The phases of a simulated start, and injected faults."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Phases:
    """The seconds of each phase of a start; draining lasts as long as running requests do.

    ``start_s``: processes and communicators. Weights load at ``read_bytes_per_s``, from disk or
    from peers. ``warm_up_s``: compilation, profiling, graph capture. A replica on standby loads no
    weights: it takes ``standby_s``, and ``further_standby_s`` more for each other replica that
    starts on its node. The devices of a stopped replica stay occupied for ``stop_s``.
    """

    start_s: float = 4.0
    read_bytes_per_s: float = float("inf")
    warm_up_s: float = 0.0
    stop_s: float = 0.0
    standby_s: float = 4.0
    further_standby_s: float = 1.0

    def load_s(self, weights_bytes: float) -> float:
        """Seconds from the order to the first request; the bytes are those of the whole replica."""
        return self.start_s + weights_bytes / self.read_bytes_per_s + self.warm_up_s


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeLoss:
    """A node that loses power at ``at_s`` and is back, empty, at ``back_s``.

    ``told_after_s``: when somebody says that it is dead; without that it is noticed by its silence.
    """

    node: str
    at_s: float
    back_s: float = float("inf")
    told_after_s: float = float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """Injected faults; probabilities in [0, 1] from one seeded generator.

    Per action: it is lost, or executed twice. Per start: it fails at its end, or takes
    ``slow_factor`` times as long. Per observation: the previous one is returned again; an
    impossible action that follows from it is ignored. Per transfer and per check of a wave: it
    fails halfway. ``crashes`` are times (seconds) and ids of replicas that end then, if they live;
    those of ``hangs`` stop making progress and are ended ``hang_after_s`` later. ``node_losses``:
    replicas of a lost node stop making progress, and end when the loss is noticed. ``replay``:
    requests of a replica that ends continue elsewhere; otherwise they are lost.
    """

    lost_action: float = 0.0
    repeated_action: float = 0.0
    failed_start: float = 0.0
    slow_start: float = 0.0
    slow_factor: float = 5.0
    stale_observation: float = 0.0
    failed_transfer: float = 0.0
    crashes: tuple[tuple[float, str], ...] = ()
    hangs: tuple[tuple[float, str], ...] = ()
    hang_after_s: float = 10.0
    node_losses: tuple[NodeLoss, ...] = ()
    replay: bool = True
    seed: int = 0
