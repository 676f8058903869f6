"""How long replicas took to start, by shape: what the next start is taken to need. Pure."""

from oserve.core import Observation, ReplicaPhase, ReplicaSpec

# How much the last start of a replica counts for the time that the next is taken to need.
_LEARNING_RATE = 0.5


class StartTimes:
    """Seconds from start to ready, by shape, as seen; ``usual_s`` before any was."""

    def __init__(self, usual_s: float) -> None:
        self._usual_s = usual_s
        self._by_shape: dict[str, float] = {}
        self._loading: dict[str, tuple[ReplicaSpec, float]] = {}

    def observe(self, observation: Observation) -> None:
        """Take in replicas that became ready."""
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
        """Of this replica: as its shape took, else as the slowest took."""
        known = self._by_shape.get(spec.shape.name)
        return known if known is not None else max(self._by_shape.values(), default=self._usual_s)

    def state(self) -> dict[str, float]:
        """Plain data that ``restore`` takes."""
        return dict(self._by_shape)

    def restore(self, state: dict[str, float]) -> None:
        """Go on where ``state`` was taken."""
        self._by_shape = {str(name): float(took_s) for name, took_s in state.items()}
