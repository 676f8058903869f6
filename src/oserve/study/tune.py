"""The search for the best settings of a policy: candidates race in the simulator.

The tuner first runs a candidate a little above the capacity of the best so far. Only if the
candidate holds there, its capacity is measured. So a loser costs one run, which ends once the SLO
is out of reach. The search is the same for every policy, on the traffic of ``scene.learned``.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from oserve.control.dispatch.order import OrderPolicy
from oserve.core import DeploymentPlan, OServeError, ReplicaShape, Role
from oserve.evaluate.simulator import Levers, Routing, SimulatedServing, Simulator, largest_scale
from oserve.evaluate.verification import serving_of
from oserve.plan.packing import Packing
from oserve.plan.place import place_replicas
from oserve.plan.planning import PlanRequest, PlanResult, compute_plan
from oserve.study.scene import CHUNKS, SEQS, USUAL_CHUNK, USUAL_SEQS, Scene

# Smaller gains are noise of one trace.
_LEAST_GAIN = 0.005
_TOLERANCE = 0.01
# A replica has KV room if it holds so many requests of full context. That gives TP4 for OPT-66B
# and Llama-2-70B on H100, and TP2 for LLaMA-30B, which are usual choices.
_ROOM = 16
_PER_TOKENS = 1500.0
_LATENCY_CHUNKS = (512, 1024, 2048, 256, 4096)
PENALTIES_S = (5.0, 10.0, 20.0, 30.0)
"""Seconds of rank per 1,500 prompt tokens that are tried for the request order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredServing:
    """A serving with its capacity: the largest scale of the learned traffic at which it holds."""

    serving: SimulatedServing
    scale: float


def by_length(penalty_s: float, *, freshest_first_s: float = 0.0) -> OrderPolicy:
    """Short prompts first: ``penalty_s`` per 1,500 prompt tokens, at most a minute."""
    return OrderPolicy(
        penalty_s_per_token=penalty_s / _PER_TOKENS,
        max_penalty_s=60.0,
        freshest_first_s=freshest_first_s,
    )


class Tuner:
    """The settings of one scene; each is searched at its first use."""

    def __init__(self, scene: Scene, *, said: Callable[[str], None] = lambda _: None) -> None:
        self.scene = scene
        self.simulator = Simulator(scene.source)
        self._said = said

    # -- measuring ------------------------------------------------------------------------------
    def holds(
        self, serving: SimulatedServing, scale: float, *, knows_outputs: bool = False
    ) -> bool:
        """Whether the SLO holds on the learned traffic, ``scale`` times as fast."""
        traffic = self.scene.learned.faster(scale)
        expected = traffic.output_tokens if knows_outputs else None
        served = self.scene.served(serving)
        return self.simulator.holds(served, traffic, self.scene.slo, expected=expected)

    def measure(
        self, serving: SimulatedServing, *, start: float = 1.0, knows_outputs: bool = False
    ) -> MeasuredServing:
        """The capacity of one serving; the search begins at ``start``."""
        scale = largest_scale(
            lambda at: self.holds(serving, at, knows_outputs=knows_outputs),
            start=start,
            tolerance=_TOLERANCE,
        )
        return MeasuredServing(serving=serving, scale=scale)

    def race(
        self,
        candidates: Iterable[SimulatedServing],
        best: MeasuredServing | None = None,
        *,
        knows_outputs: bool = False,
    ) -> MeasuredServing:
        """The best of the candidates and ``best``; raises OServeError where nothing holds."""
        tried: set[str] = set()
        for serving in candidates:
            key = repr(serving)
            if key in tried:
                continue
            tried.add(key)
            if best is None or best.scale == 0.0:
                best = self.measure(serving, knows_outputs=knows_outputs)
                continue
            bar = best.scale * (1.0 + _LEAST_GAIN)
            if self.holds(serving, bar, knows_outputs=knows_outputs):
                best = self._improved(serving, bar, knows_outputs)
        if best is None or best.scale == 0.0:
            raise OServeError(
                "no deployment that was tried meets the SLO at any rate",
                place="--slo-ttft-ms",
                remedy="loosen the SLO, or use more or faster devices",
            )
        return best

    def _improved(
        self, serving: SimulatedServing, bar: float, knows_outputs: bool
    ) -> MeasuredServing:
        """The capacity of a serving that holds at ``bar``."""
        known = {bar: True}

        def holds(at: float) -> bool:
            if at not in known:
                known[at] = self.holds(serving, at, knows_outputs=knows_outputs)
            return known[at]

        scale = largest_scale(holds, start=bar, tolerance=_TOLERANCE, step=1.06)
        return MeasuredServing(serving=serving, scale=scale)

    # -- servings -------------------------------------------------------------------------------
    def homogeneous(self, shape: ReplicaShape, levers: Levers) -> SimulatedServing:
        """As many replicas of a shape as fit, of the same form on every kind of device."""
        scene = self.scene
        wanted = []
        for kind in sorted({device.kind for device in scene.devices}):
            own = replace(shape, device_kind=kind)
            count = Packing(scene.devices, [own]).largest(0)
            if count and self.simulator.kv_tokens(own) > 0:
                wanted.append((own, count))
        return self.deployed(wanted, levers)

    def deployed(
        self, wanted: Sequence[tuple[ReplicaShape, int]], levers: Levers
    ) -> SimulatedServing:
        """The given number of replicas of each shape, without routing shares."""
        scene = self.scene
        placed = place_replicas(wanted, scene.devices)
        plan = DeploymentPlan(
            id=_in_words(wanted),
            replicas=placed.replicas,
            length_classes=scene.demand.classes,
            routing_shares={},
        )
        return SimulatedServing(plan=plan, levers=levers)

    def forms(self, chunks: Sequence[int], seqs: int = USUAL_SEQS) -> list[ReplicaShape]:
        """Shapes for homogeneous deployments: every form with each of these chunk budgets.

        The chunk budgets come outermost, so that a race sees the likeliest first.
        """
        found: dict[ReplicaShape, None] = {}
        for shape in self._usual_kind():
            wanted = replace(shape, max_num_seqs=seqs)
            for chunk in chunks:
                wanted = replace(wanted, max_num_batched_tokens=chunk)
                if self.simulator.kv_tokens(wanted) >= self._longest:
                    found[wanted] = None
        return sorted(
            found,
            key=lambda s: (
                chunks.index(s.max_num_batched_tokens),
                s.pipeline_parallel_size,
                -s.tensor_parallel_size,
            ),
        )

    def varied(
        self, serving: SimulatedServing, **fields: Sequence[int]
    ) -> Iterable[SimulatedServing]:
        """A homogeneous serving with other limits of its shape, such as ``max_num_seqs``."""
        shape = serving.plan.replicas[0].shape
        for field, values in fields.items():
            for value in values:
                other = replace(shape, **{field: value})  # type: ignore[arg-type]
                if self.simulator.kv_tokens(other) >= self._longest:
                    yield self.homogeneous(other, serving.levers)

    @cached_property
    def _longest(self) -> int:
        traffic = self.scene.traffic
        return int((traffic.prompt_tokens + traffic.output_tokens).max())

    def _usual_kind(self) -> list[ReplicaShape]:
        """The shapes in the precision of the baselines, on one kind of device."""
        kind = min(device.kind for device in self.scene.devices)
        precision = self.scene.precision
        return [s for s in self.scene.shapes if s.device_kind == kind and s.precision is precision]

    @cached_property
    def default_shape(self) -> ReplicaShape:
        """The smallest tensor-parallel size with KV room, vLLM's usual chunk budget and seqs."""
        able = [
            replace(shape, max_num_batched_tokens=USUAL_CHUNK, max_num_seqs=USUAL_SEQS)
            for shape in self._usual_kind()
        ]
        room = _ROOM * self.scene.context
        roomy = [shape for shape in able if self.simulator.kv_tokens(shape) >= room] or able

        def size(shape: ReplicaShape) -> tuple[int, int]:
            return (shape.pipeline_parallel_size, shape.tensor_parallel_size)

        return min(roomy, key=size)

    # -- static baselines -----------------------------------------------------------------------
    @cached_property
    def default(self) -> SimulatedServing:
        """See ``static-default``."""
        return self.homogeneous(self.default_shape, JSQ)

    @cached_property
    def best(self) -> MeasuredServing:
        """See ``static-best``."""
        self._said("best homogeneous deployment")
        found = self.race(
            (self.homogeneous(s, JSQ) for s in self.forms([USUAL_CHUNK])),
            self.measure(self.default),
        )
        return self.race(self.varied(found.serving, max_num_seqs=SEQS), found)

    @cached_property
    def best_chunk(self) -> MeasuredServing:
        """See ``static-best-chunk``: every form with every chunk budget."""
        self._said("best chunk budget")
        found = self.race(
            (self.homogeneous(s, JSQ) for s in self.forms((1024, 512, 2048, 4096, 256, 8192))),
            self.best,
        )
        return self.race(self.varied(found.serving, max_num_seqs=SEQS), found)

    @cached_property
    def best_tuned(self) -> MeasuredServing:
        """See ``static-best-tuned``: form, chunk budget and order, the last two together."""
        self._said("best chunk budget and order")
        found = self.race(self.reordered(self.best_chunk), self.best_chunk)
        levers = found.serving.levers
        found = self.race((self.homogeneous(s, levers) for s in self.forms((512, 1024))), found)
        found = self.race(
            self.varied(found.serving, max_num_batched_tokens=CHUNKS, max_num_seqs=SEQS), found
        )
        return self.race(self.reordered(found), found)

    @cached_property
    def latency(self) -> SimulatedServing:
        """See ``static-latency``; the best tuned deployment where none holds at the given rate."""
        self._said("least latency within the SLO")
        orders = (JSQ, self.best_tuned.serving.levers)
        tried = [self.homogeneous(s, orders[0]) for s in self.forms(_LATENCY_CHUNKS)]
        tried += [replace(item, levers=orders[1]) for item in tried]
        able = [item for item in tried if self.holds(item, 1.0)]
        if not able:
            return self.best_tuned.serving
        best = min(able, key=self._p99_s)
        others = [replace(best, levers=replace(JSQ, order=by_length(s))) for s in PENALTIES_S]
        others += self.varied(best, max_num_seqs=SEQS)
        return min((best, *(o for o in others if self.holds(o, 1.0))), key=self._p99_s)

    def _p99_s(self, serving: SimulatedServing) -> float:
        """P99 of the end-to-end latency over the usual traffic; what never ends takes forever."""
        results = self.simulator.run(self.scene.served(serving), self.scene.usual)
        whole_s = np.where(np.isnan(results.finish_s), np.inf, results.finish_s - results.arrival_s)
        return float(np.quantile(whole_s, 0.99, method="higher"))

    def reordered(self, found: MeasuredServing) -> Iterable[SimulatedServing]:
        for penalty_s in PENALTIES_S:
            levers = replace(found.serving.levers, order=by_length(penalty_s))
            yield replace(found.serving, levers=levers)

    # -- the programme's plans ------------------------------------------------------------------
    @property
    def question(self) -> PlanRequest:
        """The plan request: the learned demand, within the SLO."""
        scene = self.scene
        return PlanRequest(
            model=scene.model,
            devices=scene.devices,
            demand=scene.demand,
            source=scene.source,
            shapes=scene.shapes,
            limits=scene.limits,
            tiers=scene.tiers,
            seed=scene.seed,
            candidates=10,
        )

    @cached_property
    def planned(self) -> PlanResult:
        """The linear programme's plans for the request."""
        return compute_plan(self.question)

    def heterogeneous(self, levers: Levers, *, shares: bool = True) -> list[SimulatedServing]:
        """The programme's best plan and candidates, as far as they have several shapes."""
        planned = self.planned.planned
        servings = []
        for item in (planned.best, *planned.candidates):
            if sum(1 for count in item.counts if count) < 2:
                continue
            serving = serving_of(self.planned, item, levers)
            if not shares:
                serving = replace(serving, plan=replace(serving.plan, routing_shares={}))
            servings.append(serving)
        return servings


def _in_words(wanted: Sequence[tuple[ReplicaShape, int]]) -> str:
    counts: dict[str, int] = {}
    for shape, count in wanted:
        role = "" if shape.role is Role.BOTH else f" {shape.role.value}"
        name = f"{shape.name}{role}"
        counts[name] = counts.get(name, 0) + count
    return " + ".join(f"{count} x {name}" for name, count in counts.items())


JSQ = Levers(routing=Routing.LEAST_REQUESTS)
"""Join the shortest queue, first come, first served."""
