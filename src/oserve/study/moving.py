"""How long a start takes when the weights come from other devices.

Replicas are rolled out in stages as on a live server; what changes is the start. Once the old
replicas on its devices are drained they give up their KV cache. Where both weights fit, a standby
engine has come up meanwhile and nothing is waited for; else the old ones end first and starting
the engine counts. Then the weights come over idle links (``switch.transfer``), at the share of
their bandwidth and with the constants of the scene's ``SwitchCosts``; transfers at the same time
take turns. With nobody to copy from it is a cold start.
"""

from collections.abc import Sequence

from oserve.core import OServeError, ReplicaPhase, ReplicaSpec
from oserve.perf.device import find_device, find_link
from oserve.perf.source import RooflineSource
from oserve.sim.cluster import Life, SimulatedCluster
from oserve.study.scene import Scene
from oserve.switch.layout import architecture_of, placed_of
from oserve.switch.links import links_of
from oserve.switch.transfer import TransferPlan, plan_transfer


class TransferTimes:
    """Of a scene's replicas; makes each transfer plan once."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._costs = scene.switch_costs
        self._links = links_of(scene.devices, find_link(scene.network))
        self._known: dict[tuple[object, ...], float] = {}

    @property
    def usual_s(self) -> float:
        """What a start is taken to need before one was seen, copying taken as a second."""
        costs = self._costs
        return costs.engine_start_s + costs.join_s + 1.0 + costs.verify_s + costs.commit_s

    def start_s(
        self,
        spec: ReplicaSpec,
        *,
        holders: Sequence[ReplicaSpec],
        left: Sequence[ReplicaSpec],
        beside: int,
    ) -> float:
        """Seconds from drained devices to a replica that serves.

        ``holders`` have weights and stay, ``left`` were on its devices last, ``beside`` others are
        starting at this moment.
        """
        scene, costs = self._scene, self._costs
        kept = tuple(old for old in left if self._fit_together(old, spec))
        key = (spec, tuple(holders), kept, tuple(left), beside)
        if key not in self._known:
            plan = self._plan(spec, (*holders, *kept))
            if plan is None:
                self._known[key] = scene.phases.load_s(scene.weights_bytes(spec.shape))
            else:
                hidden = bool(left) and len(kept) == len(left)
                engine_s = costs.engine_start_s + beside * costs.further_start_s
                self._known[key] = (
                    (0.0 if hidden else costs.room_s + engine_s)
                    + costs.join_s
                    + (plan.busy_s / costs.link_share + plan.latency_s) * (1 + beside)
                    + costs.verify_s
                    + max(plan.given_bytes.values()) * costs.check_s_per_byte
                    + costs.commit_s
                )
        return self._known[key]

    def _plan(self, spec: ReplicaSpec, sources: Sequence[ReplicaSpec]) -> TransferPlan | None:
        """``None`` where the weights are nowhere, or the model's are not known."""
        source = self._scene.source
        if not sources or not isinstance(source, RooflineSource):
            return None
        try:
            return plan_transfer(
                architecture_of(source.model),
                [placed_of(item) for item in sources],
                [placed_of(spec)],
                self._links,
            )
        except OServeError:
            return None

    def _fit_together(self, old: ReplicaSpec, new: ReplicaSpec) -> bool:
        """Whether an engine that gave up its KV cache and a new one without fit on a device."""
        source = self._scene.source
        if not isinstance(source, RooflineSource):
            return False
        both = [source.memory(spec.shape) for spec in (old, new)]
        needed = sum(item.weights_bytes + item.reserve_bytes for item in both)
        return needed <= find_device(new.shape.device_kind).memory_bytes


class TransferStarts:
    """A ``sim.cluster.LoadTime``: replicas get their weights from each other."""

    def __init__(self, times: TransferTimes) -> None:
        self._times = times

    def __call__(self, cluster: SimulatedCluster, spec: ReplicaSpec) -> float:
        """Seconds until a replica that starts now can serve."""
        loading = [item for item in cluster.alive if item.phase is ReplicaPhase.LOADING]
        holders = [item.spec for item in cluster.alive if item.phase is not ReplicaPhase.LOADING]
        left = _last_on(cluster.lives, spec)
        return self._times.start_s(spec, holders=holders, left=left, beside=len(loading))


def _last_on(lives: Sequence[Life], spec: ReplicaSpec) -> tuple[ReplicaSpec, ...]:
    """The last replica on each device of ``spec``, if it is gone."""
    last: dict[str, Life] = {}
    for life in lives:
        last.update(dict.fromkeys(set(life.spec.devices) & set(spec.devices), life))
    gone = {life.spec: None for life in last.values() if life.end_s is not None}
    return tuple(sorted(gone, key=lambda item: item.id))
