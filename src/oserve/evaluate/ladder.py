"""Builds ladders by simulation: many deployments, each at many loads, on the same requests.

First every deployment is simulated at a few loads. Those that come near the best at one of them are
then simulated at all loads, with mixtures of two shapes and, where energy counts, with fewer
replicas. All deployments serve the same requests, so that their differences are not luck.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from oserve.control.ladder import (
    Goal,
    Ladder,
    LadderDeployment,
    LoadScore,
    Shapes,
    counted,
    shapes_of,
)
from oserve.control.load_facts import LoadRates
from oserve.core import DeploymentPlan, Device, LengthClass, Objective, OServeError, ReplicaShape
from oserve.evaluate.attainment import met
from oserve.evaluate.capacities import LengthSamples
from oserve.evaluate.energy import static_energy
from oserve.evaluate.ladder_traffic import LadderTraffic, drawn_traffic
from oserve.evaluate.simulator import (
    Floats,
    Levers,
    Mask,
    SimulatedServing,
    Simulator,
)
from oserve.plan.mixtures import homogeneous, mixtures, smaller
from oserve.plan.packing import ANY_KIND
from oserve.plan.place import place_replicas
from oserve.sim.results import FleetResults
from oserve.sim.types import Status
from oserve.traces import Slo

LOADS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.15, 1.3)
"""Loads of a ladder whose reference is the largest load that a deployment holds."""

_COARSE = 5
# A deployment that is within this factor of the best at a coarse load is simulated at all loads.
_NEAR = 1.15
_MOST_PER_LOAD = 3
_MOST_MIXTURES = 24
# The search for the largest load: factor of a step, and its bound.
_STEP = 1.3
_MOST_STEPS = 40
# Below this part of the load that the work suggests, the SLO cannot be held.
_LEAST_LOAD = 0.03
# Requests hardly meet at this multiple of the lowest load.
_IDLE = 0.2
# Past this attainment a deployment is not simulated at higher loads.
_HOPELESS = 0.1
# Requests that arrive in the first part find an empty cluster.
_WARM = 0.1
# A type with fewer requests in a run says nothing about its attainment.
_FEWEST_OF_TYPE = 40
# Without an SLO a request is in time within this multiple of its latency on an idle cluster.
_UNLOADED = 5.0
_LATEST_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LadderCase:
    """What a ladder is built from; picklable.

    ``rates``: requests/s by type; only their proportions matter, unless ``traffic`` is given.
    ``lengths`` and ``burstiness``: see ``drawn_traffic``. ``work``: of a request of each type.
    ``shapes`` to choose from; ``present``: deployments that must be in the ladder. ``goal``: for
    what deployments are kept. ``min_shapes``: of each deployment, where some have so many.
    ``mixed``: also deployments of two shapes. ``traffic``: simulate these requests at the given
    ``loads``, in place of drawn ones. ``plans``: deployments that are simulated with their own
    routing shares.
    """

    names: tuple[str, ...]
    rates: LoadRates
    lengths: tuple[LengthSamples, ...]
    work: tuple[float, ...]
    devices: tuple[Device, ...]
    classes: tuple[LengthClass, ...]
    shapes: tuple[ReplicaShape, ...]
    levers: Levers
    slo: Slo
    goal: Goal
    present: tuple[Shapes, ...] = ()
    min_shapes: int = 1
    mixed: bool = True
    burstiness: tuple[float, ...] = ()
    seed: int = 0
    traffic: LadderTraffic | None = None
    loads: tuple[float, ...] = LOADS
    plans: tuple[DeploymentPlan, ...] = ()


class LadderBuilder:
    """Builds one ladder; ``progress`` is called with the number of simulations so far."""

    def __init__(
        self,
        simulator: Simulator,
        case: LadderCase,
        progress: Callable[[int], None] = lambda _done: None,
    ) -> None:
        self._simulator = simulator
        self._case = case
        self._progress = progress
        self._runs: dict[tuple[Shapes, float], LoadScore] = {}
        self._traffic = case.traffic or _drawn(case, case.rates)
        self._done = 0
        self._unloaded_s: Floats | None = None

    def build(self) -> Ladder:
        """The ladder. Raises OServeError if no shape fits the devices."""
        case = self._case
        base = [counted(counts) for counts in homogeneous(case.devices, self._usable())]
        if not base:
            raise OServeError(
                "no replica shape fits the devices",
                place="planning",
                remedy="use more or larger devices, or fewer bits a weight",
            )
        if case.traffic is None:
            scale = self._largest(base)
            self._use(_drawn(case, tuple(scale * rate for rate in case.rates)))
        coarse = _spread(case.loads, _COARSE)
        kept = self._kept(self._scored(base, coarse), coarse)
        more = list(self._variations(kept))
        kept = self._kept(self._scored([*kept, *more], coarse), coarse)
        chosen = [*kept, *(item for item in case.present if self._is_known(item))]
        return self._ladder(self._scored(chosen, case.loads))

    # -- which deployments ----------------------------------------------------------------------
    def _usable(self) -> list[ReplicaShape]:
        requests = self._traffic.requests
        longest = int((requests.prompt_tokens + requests.output_tokens).max())
        able = [s for s in self._case.shapes if self._simulator.kv_tokens(s) >= longest]
        return able or [s for s in self._case.shapes if self._simulator.kv_tokens(s) > 0]

    def _is_known(self, shapes: Shapes) -> bool:
        """Whether a deployment, which may come from an operator, can be simulated."""
        try:
            placed = self._serving(shapes).plan.replicas
            return bool(placed) and all(self._simulator.kv_tokens(s.shape) > 0 for s in placed)
        except OServeError:
            return False

    def _variations(self, kept: Sequence[Shapes]) -> Iterator[Shapes]:
        """Mixtures of two, and fewer replicas where energy counts."""
        plain = [Counter(dict(item)) for item in kept]
        pairs = plain if self._case.mixed else []
        for counts in mixtures(self._case.devices, pairs, most=_MOST_MIXTURES):
            yield counted(counts)
        if Objective.ENERGY in self._case.goal.objectives:
            for item in plain:
                for counts in smaller(item):
                    yield counted(counts)

    def _kept(self, items: Sequence[LadderDeployment], loads: Sequence[float]) -> list[Shapes]:
        """The deployments that come near the best at one of the loads, or carry most."""
        goal = self._case.goal
        varied = [item for item in items if self._is_varied(item.shapes)] or list(items)
        ladder = self._ladder(varied)
        count = len(varied)
        by_capacity = sorted(range(count), key=lambda i: -ladder.capacity(i, goal))
        found = dict.fromkeys(by_capacity[:_MOST_PER_LOAD])
        for load in loads:
            at = ladder.scores(load)
            holding = at.holding(goal)
            if not holding:
                continue
            best = sorted(at.guarded(holding, goal), key=lambda i: at.objective(i, goal))
            most = _NEAR * at.objective(best[0], goal)
            found |= dict.fromkeys(
                i for i in best[:_MOST_PER_LOAD] if at.objective(i, goal) <= most
            )
        return [varied[index].shapes for index in found]

    def _is_varied(self, shapes: Shapes) -> bool:
        return len({shape.name for shape, _ in shapes}) >= self._case.min_shapes

    def _largest(self, base: Sequence[Shapes]) -> float:
        """The largest load that a deployment holds, by interpolation; 1 where none was found."""
        load, held = 1.0, 0.0
        likely = list(base)
        for _ in range(_MOST_STEPS):
            holder = next((item for item in likely if self._holds(item, load)), None)
            if holder is not None:
                likely.remove(holder)
                likely.insert(0, holder)
                held, load = load, load * _STEP
            elif held:
                return max(self._held(item, held, load) for item in base)
            elif load < _LEAST_LOAD:
                return 1.0
            else:
                load /= _STEP
        return held or 1.0

    def _held(self, shapes: Shapes, low: float, high: float) -> float:
        """The load up to which a deployment holds, between two that were simulated."""
        runs = [self._runs.get((shapes, load)) for load in (low, high)]
        scores = tuple(score for score in runs if score is not None)
        if len(scores) < len(runs):
            return low
        found = self._ladder([LadderDeployment(shapes=shapes, scores=scores)])
        return max(low, found.capacity(0, self._case.goal))

    def _holds(self, shapes: Shapes, load: float) -> bool:
        return self._score(shapes, load).attainment >= self._case.goal.attainment

    # -- simulations ----------------------------------------------------------------------------
    def _use(self, traffic: LadderTraffic) -> None:
        self._traffic = traffic
        self._runs = {}
        self._unloaded_s = None

    def _scored(
        self, deployments: Iterable[Shapes], loads: Sequence[float]
    ) -> list[LadderDeployment]:
        found = []
        for shapes in dict.fromkeys(deployments):
            scores: list[LoadScore] = []
            for load in loads:
                scores.append(self._score(shapes, load))
                if scores[-1].attainment < _HOPELESS:
                    break
            found.append(LadderDeployment(shapes=shapes, scores=tuple(scores)))
        return found

    def _score(self, shapes: Shapes, load: float) -> LoadScore:
        key = (shapes, load)
        if key not in self._runs:
            self._runs[key] = self._simulated(shapes, load)
            self._done += 1
            self._progress(self._done)
        return self._runs[key]

    def _simulated(self, shapes: Shapes, load: float) -> LoadScore:
        requests, kinds = self._traffic.at(load)
        serving = self._serving(shapes)
        results = self._simulator.run(serving, requests, latest_s=_LATEST_S)
        good = self._met(results)
        counts = np.arange(len(requests)) >= _WARM * len(requests)
        done = counts & (results.status == Status.COMPLETED)
        e2e_s = results.finish_s - results.arrival_s
        ttft_s = results.first_token_s - results.arrival_s
        attained, latency = [], []
        for kind in range(len(self._case.names)):
            mine = counts & (kinds == kind)
            enough = int(mine.sum()) >= _FEWEST_OF_TYPE
            attained.append(float(good[mine].mean()) if enough else 1.0)
            latency.append(_mean(e2e_s[done & mine]))
        return LoadScore(
            load=load,
            attainment=float(good[counts].mean()),
            type_attainment=tuple(attained),
            type_e2e_s=tuple(latency),
            p50_e2e_s=_quantile(e2e_s[done], 0.5),
            p99_e2e_s=_quantile(e2e_s[done], 0.99),
            p50_ttft_s=_quantile(ttft_s[done], 0.5),
            p99_ttft_s=_quantile(ttft_s[done], 0.99),
            joules=self._joules(serving, results),
        )

    def _met(self, results: FleetResults) -> Mask:
        """The requests in time: within the SLO, else within a multiple of their best latency."""
        if self._case.slo != Slo():
            return met(results, self._case.slo)
        if self._unloaded_s is None:
            self._unloaded_s = self._unloaded()
        done: Mask = results.status == Status.COMPLETED
        with np.errstate(invalid="ignore"):
            e2e_s = results.finish_s - results.arrival_s
            return done & (e2e_s <= _UNLOADED * self._unloaded_s[: len(e2e_s)])

    def _unloaded(self) -> Floats:
        """The least latency of each request on an otherwise idle cluster, in seconds."""
        base = [counted(counts) for counts in homogeneous(self._case.devices, self._usable())]
        requests = self._traffic.requests.faster(_IDLE * min(self._case.loads))
        found = np.full(len(requests), np.inf)
        for shapes in base[:: max(1, len(base) // _MOST_PER_LOAD)]:
            results = self._simulator.run(self._serving(shapes), requests, latest_s=_LATEST_S)
            found = np.fmin(found, results.finish_s - results.arrival_s)
        return found

    def _joules(self, serving: SimulatedServing, results: FleetResults) -> float:
        """Per request, of all replicas for the whole run."""
        ended = results.finish_s[np.isfinite(results.finish_s)]
        seconds = float(ended.max()) if len(ended) else results.now_s
        source, devices = self._simulator.source, self._case.devices
        energy = static_energy(source, serving.plan, results, devices, seconds)
        return energy.serving_j / max(1, len(results.arrival_s))

    def _serving(self, shapes: Shapes) -> SimulatedServing:
        case = self._case
        for given in case.plans:
            if shapes_of(given.replicas) == shapes:
                return SimulatedServing(plan=given, levers=case.levers)
        plan = DeploymentPlan(
            id="ladder",
            replicas=place_replicas(self._located(shapes), case.devices).replicas,
            length_classes=case.classes,
            routing_shares={},
        )
        return SimulatedServing(plan=plan, levers=case.levers)

    def _located(self, shapes: Shapes) -> Shapes:
        """The shapes on their kind of devices, where there is but one."""
        kinds = {device.kind for device in self._case.devices}
        if len(kinds) > 1:
            return shapes
        kind = next(iter(kinds))
        return tuple(
            (replace(shape, device_kind=kind) if shape.device_kind == ANY_KIND else shape, count)
            for shape, count in shapes
        )

    def _ladder(self, items: Sequence[LadderDeployment]) -> Ladder:
        case = self._case
        return Ladder(
            names=case.names,
            rates=self._traffic.rates,
            work=case.work,
            loads=case.loads,
            deployments=tuple(items),
        )


def _drawn(case: LadderCase, rates: LoadRates) -> LadderTraffic:
    burstiness = case.burstiness or (0.0,) * len(rates)
    return drawn_traffic(case.lengths, rates, burstiness=burstiness, seed=case.seed)


def _spread(loads: Sequence[float], count: int) -> list[float]:
    """So many of the loads, evenly spread, the first and the last among them."""
    places = np.unique(np.linspace(0, len(loads) - 1, count).round().astype(int))
    return [loads[place] for place in places]


def _mean(values: Floats) -> float:
    return float(values.mean()) if len(values) else _LATEST_S


def _quantile(values: Floats, level: float) -> float:
    return float(np.quantile(values, level)) if len(values) else _LATEST_S
