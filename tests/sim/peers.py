"""How other systems' gateways choose a replica, in place of the live router."""

from collections.abc import Callable, Mapping, Sequence, Set

from oserve.control.dispatch.router import NoRoute, Route, Router, RouteReason, work_s
from oserve.core import ReplicaLoad, Request
from sim.engine_reference import Engine, blocks


class PeerRouter(Router):
    """``policy``: work, requests, turn or freeness; the last looks into the ``engines``."""

    def __init__(self, policy: str, engines: Sequence[Engine]) -> None:
        super().__init__({})
        self._policy = policy
        self._engines = engines
        self._turn = 0
        # Blocks of requests that were routed and are not in the engines' queues yet.
        self.routed: dict[str, int] = {}

    def pick(
        self,
        request: Request,
        loads: Mapping[str, ReplicaLoad],
        *,
        exclude: Set[str] = frozenset(),
        cached: Mapping[str, int] | None = None,
    ) -> Route | NoRoute:
        names = [engine.name for engine in self._engines]
        # In order of number; the first of equals is taken.
        allowed = sorted(loads.keys() - exclude, key=names.index)
        free = [loads[name] for name in allowed if loads[name].inflight < loads[name].max_inflight]
        if not free:
            return NoRoute.ALL_FULL if allowed else NoRoute.NO_REPLICA
        measures: dict[str, Callable[[ReplicaLoad], float]] = {
            "requests": lambda load: load.inflight,
            "work": lambda load: load.work_s + work_s(request, load),
            "turn": lambda load: (names.index(load.replica) - self._turn) % len(names),
            "freeness": lambda load: -self._freeness(names.index(load.replica)),
        }
        chosen = min(free, key=measures[self._policy])
        self._turn = (names.index(chosen.replica) + 1) % len(names)
        routed = self.routed.get(chosen.replica, 0)
        self.routed[chosen.replica] = routed + blocks(request.prompt_tokens)
        return Route(
            replica=chosen.replica, reason=RouteReason.POOL, work_s=work_s(request, chosen)
        )

    def _freeness(self, index: int) -> float:
        """Llumnix: blocks free beyond what the queue asks for, per running sequence."""
        engine = self._engines[index]
        layout = engine.layout
        wanted = sum(layout.grown(job.known) + layout.beside(job) for job in engine.waiting)
        wanted += self.routed.get(engine.name, 0)
        return (engine.free - wanted) / max(1, len(engine.running))
