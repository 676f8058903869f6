"""Start times of replicas by shape, which predict how long the next start takes."""

from oserve.core import Observation, ReplicaPhase, ReplicaSpec

# Weight of the last start in the moving average of a shape.
_LEARNING_RATE = 0.5


class StartTimes:
    """Observed seconds from start to ready, by shape; ``usual_s`` until one is observed."""

    def __init__(self, usual_s: float) -> None:
        self._usual_s = usual_s
        self._by_shape: dict[str, float] = {}
        self._loading: dict[str, tuple[ReplicaSpec, float]] = {}

    def observe(self, observation: Observation) -> None:
        """Learn from replicas that became ready."""
        for state in observation.replicas:
            name = state.spec.id
            if state.phase is ReplicaPhase.LOADING:
                self._loading[name] = (state.spec, state.since_s)
                continue
            spec, since_s = self._loading.pop(name, (None, 0.0))
            if state.phase is ReplicaPhase.READY and spec == state.spec:
                took_s = max(0.0, state.since_s - since_s)
                key = state.spec.shape.name
                before_s = self._by_shape.get(key, took_s)
                self._by_shape[key] = before_s + _LEARNING_RATE * (took_s - before_s)

    def start_s(self, spec: ReplicaSpec) -> float:
        """Expected start time of this replica: of its shape if known, else of the slowest shape."""
        known = self._by_shape.get(spec.shape.name)
        return known if known is not None else max(self._by_shape.values(), default=self._usual_s)

    def state(self) -> dict[str, float]:
        """State for ``restore``, as plain data."""
        return dict(self._by_shape)

    def restore(self, state: dict[str, float]) -> None:
        """Continue from ``state``."""
        self._by_shape = {str(name): float(took_s) for name, took_s in state.items()}
