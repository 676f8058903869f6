"""A scene: everything that the policies of one comparison have in common.

Model, devices, traffic, limits, and the time that a replica needs to start. With a ``learn_s`` of
``None`` policies are tuned in hindsight, on all of the traffic, as the strongest static baseline
must be. With a number they are tuned on the first ``learn_s`` seconds only. The scene of a day has
its tuning part apart: ``peak``, the busiest hour of another day, and ``history``, all of that day.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from oserve.core import Device, OServeError, Precision, ReplicaShape, Tier
from oserve.evaluate.simulator import SimulatedServing, SimulatedTraffic, traffic_from
from oserve.evaluate.tiers import tier_slo
from oserve.perf.capacity import LatencyLimits
from oserve.perf.selection import SourceChoice, find_source, shapes_for
from oserve.perf.shapes import ShapeChoices
from oserve.perf.source import DEFAULT_NETWORK, RooflineSource
from oserve.perf.table import PerformanceSource
from oserve.plan.demand import Demand
from oserve.plan.tiers import demand_by_tier, tier_indices, tier_limits
from oserve.sim.phases import Phases
from oserve.sim.types import FairShares
from oserve.switch.costs import SwitchCosts
from oserve.traces import Slo, TraceRequest

CHUNKS = (256, 512, 1024, 2048, 4096, 8192)
SEQS = (128, 256)
USUAL_CHUNK = 2048
USUAL_SEQS = 256
MOST_TENANTS = 4096
"""The simulator looks at every tenant at each arrival."""


COLD_START = Phases(start_s=15.0, read_bytes_per_s=7e9, warm_up_s=15.0)
"""Weights from a local disk: some 50 s for a 70B model in 16 bits, the paper's figure for a cold
reload. Real starts with compilation take minutes, which favours policies that do not switch."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scene:
    """``demand`` holds workload types and length classes; ``shapes`` are the shapes to use.

    ``interval_s``: the time between two decisions of a policy. ``tiers`` and ``tenants``: those
    that the traffic's columns index; with tiers, ``slo`` has their limits.
    """

    name: str
    model: str
    devices: tuple[Device, ...]
    traffic: SimulatedTraffic
    demand: Demand
    source: PerformanceSource
    context: int
    shapes: tuple[ReplicaShape, ...]
    slo: Slo
    phases: Phases = COLD_START
    interval_s: float = 60.0
    learn_s: float | None = None
    seed: int = 0
    network: str = DEFAULT_NETWORK
    switch_costs: SwitchCosts = field(default_factory=SwitchCosts)
    peak: SimulatedTraffic | None = None
    history: SimulatedTraffic | None = None
    tiers: tuple[Tier, ...] = ()
    tenants: tuple[str, ...] = ()

    def served(self, serving: SimulatedServing) -> SimulatedServing:
        """A serving whose gateway knows the scene's tiers and tenants, of equal weights."""
        if not self.tiers and not self.tenants:
            return serving
        fair = FairShares(weights=(1.0,) * len(self.tenants)) if self.tenants else None
        return replace(serving, levers=replace(serving.levers, tiers=self.tiers, fair=fair))

    @property
    def learned(self) -> SimulatedTraffic:
        """The traffic that policies may be tuned on, at the load that they must hold."""
        if self.peak is not None:
            return self.peak
        if self.learn_s is None:
            return self.traffic
        return self.traffic.between(0.0, self.learn_s)

    @property
    def usual(self) -> SimulatedTraffic:
        """All traffic that policies may know, at any load: a day where there is one."""
        return self.learned if self.history is None else self.history

    @property
    def limits(self) -> dict[str, LatencyLimits]:
        """The limits of each workload type: those of its tier, else the SLO."""
        common = LatencyLimits(ttft_s=self.slo.ttft_s, tpot_s=self.slo.tpot_s)
        return tier_limits(self.demand, self.tiers, common)

    def weights_bytes(self, shape: ReplicaShape) -> float:
        """The weights of a whole replica in bytes; 0 if the source does not know them."""
        if not isinstance(self.source, RooflineSource):
            return 0.0
        return self.source.memory(shape).weights_bytes * shape.device_count

    @property
    def precision(self) -> Precision:
        """The precision of the baselines: the first that is allowed."""
        return self.shapes[0].precision


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneChoice:
    """The arguments of ``make_scene``."""

    model: str
    devices: tuple[Device, ...]
    slo: Slo
    network: str = DEFAULT_NETWORK
    perf: str | None = None
    precisions: Sequence[Precision] = (Precision.BF16,)
    chunks: Sequence[int] = CHUNKS
    seqs: Sequence[int] = SEQS
    tensor_parallel_sizes: Sequence[int] = (1, 2, 4, 8)
    pipeline_parallel_sizes: Sequence[int] = (1, 2, 4)
    context: int | None = None
    interval_s: float = 60.0
    learn_s: float | None = None
    types: int | None = None
    seed: int = 0
    switch_costs: SwitchCosts = field(default_factory=SwitchCosts)
    tiers: tuple[Tier, ...] = ()


def make_scene(
    choice: SceneChoice, requests: Iterable[TraceRequest], *, source_name: str, name: str = ""
) -> Scene:
    """Make a scene; requests are cut to the context.

    Raises OServeError for a trace without requests (in the learned part, too) and a model that
    fits nowhere.
    """
    source, context = find_source(
        SourceChoice(
            model=choice.model,
            devices=choice.devices,
            network=choice.network,
            perf=choice.perf,
            context=choice.context,
        )
    )
    given = list(requests)
    known = [r for r in given if choice.learn_s is None or r.arrival_s < choice.learn_s]
    if given and not known:
        raise OServeError(
            f"the trace has no request in its first {choice.learn_s:g} s",
            place="--learn-s",
            remedy="learn on more of it",
        )
    default = choice.tiers[0].name if choice.tiers else ""
    demand = demand_by_tier(
        known,
        choice.tiers,
        default,
        source=source_name,
        max_model_len=context,
        k=choice.types,
        seed=choice.seed,
    )
    tenants = _tenants(given, source_name)
    traffic = traffic_from(
        given,
        max_model_len=context,
        tier=tier_indices(given, choice.tiers, default, source=source_name)
        if choice.tiers
        else None,
        tenant=np.array([tenants.index(item.tenant) for item in given]) if tenants else None,
    )
    choices = ShapeChoices(
        tensor_parallel_sizes=tuple(choice.tensor_parallel_sizes),
        pipeline_parallel_sizes=tuple(choice.pipeline_parallel_sizes),
        precisions=tuple(choice.precisions),
        max_num_batched_tokens=tuple(choice.chunks),
        max_num_seqs=tuple(choice.seqs),
    )
    shapes = tuple(
        shape
        for shape in shapes_for(source, choice.devices, choices)
        if source.kv_tokens(shape) >= _longest(traffic)
    )
    if not shapes:
        raise OServeError(
            f"no shape has KV cache for the longest request ({_longest(traffic):,} tokens)",
            place="--cluster",
            remedy="use more or larger devices, fewer bits a weight, or --max-model-len",
        )
    return Scene(
        name=name or choice.model,
        model=choice.model,
        devices=choice.devices,
        traffic=traffic,
        demand=demand,
        source=source,
        context=context,
        shapes=shapes,
        slo=tier_slo(choice.tiers) if choice.tiers else choice.slo,
        tiers=choice.tiers,
        tenants=tenants,
        interval_s=choice.interval_s,
        learn_s=choice.learn_s,
        seed=choice.seed,
        network=choice.network,
        switch_costs=choice.switch_costs,
    )


def _tenants(requests: Sequence[TraceRequest], source: str) -> tuple[str, ...]:
    """The tenants, sorted; none if the trace names none."""
    found = tuple(sorted({item.tenant for item in requests}))
    if len(found) > MOST_TENANTS:
        raise OServeError(
            f"the trace has {len(found):,} tenants",
            place=source,
            remedy=f"name at most {MOST_TENANTS:,}, such as by merging the smallest",
        )
    return found if any(found) else ()


def _longest(traffic: SimulatedTraffic) -> int:
    return int(np.max(traffic.prompt_tokens + traffic.output_tokens))
