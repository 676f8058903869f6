"""A cluster on a virtual clock: replicas that load, serve, drain and crash.

With a fleet its replicas serve the fleet's requests; without one they only live and die. The fleet
is brought up to the clock's time whenever it is looked at or asked for something, so whoever sleeps
on the clock finds all that happened meanwhile.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from oserve.core import (
    Action,
    AttachedBackend,
    Clock,
    DeploymentPlan,
    Device,
    DrainReplica,
    Endpoint,
    Observation,
    ReplicaPhase,
    ReplicaShape,
    ReplicaSpec,
    ReplicaState,
    StartFailures,
    StartReplica,
    StopReplica,
)
from oserve.perf import TokenCosts
from oserve.perf.costs import measured_costs
from oserve.perf.table import PerformanceSource
from oserve.sim.faults import Faults, Phases
from oserve.sim.fleet import Fleet
from oserve.sim.steps import StepTables, step_tables
from oserve.sim.words import Link, Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaModel:
    """What a replica can do; see ``Fleet.add_replica``."""

    steps: StepTables
    kv_tokens: int
    costs: TokenCosts
    ordered: bool = False
    kv_bytes_per_token: float = 0.0
    link: Link | None = None


ModelOf = Callable[[ReplicaSpec], ReplicaModel]


def replica_model(source: PerformanceSource, *, ordered: bool) -> ModelOf:
    """Models from a source of step times, for shapes that name their device kind."""
    made: dict[ReplicaShape, ReplicaModel] = {}

    def model(spec: ReplicaSpec) -> ReplicaModel:
        if spec.shape not in made:
            steps = source.step_model(spec.shape)
            made[spec.shape] = ReplicaModel(
                steps=step_tables(steps, spec.shape),
                kv_tokens=source.kv_tokens(spec.shape),
                costs=measured_costs(steps, spec.shape),
                ordered=ordered,
            )
        return made[spec.shape]

    return model


class SimulatedCluster:
    """Behind the door. Raises ValueError if a device is ever given to two live replicas.

    ``fleet`` and ``model`` (what a replica can do) go together. A replica that has served for
    ``stable_s`` seconds has its failures forgotten.
    """

    def __init__(
        self,
        devices: tuple[Device, ...],
        clock: Clock,
        *,
        phases: Phases | None = None,
        stable_s: float = 60.0,
        faults: Faults | None = None,
        fleet: Fleet | None = None,
        model: ModelOf | None = None,
    ) -> None:
        if (fleet is None) != (model is None):
            raise ValueError("a fleet needs a model of its replicas, and the other way round")
        self._devices = devices
        self._clock = clock
        self._phases = phases or Phases()
        self._stable_s = stable_s
        self.faults = faults or Faults()
        self._random = random.Random(self.faults.seed)
        self._crashes = sorted(self.faults.crashes)
        self._fleet = fleet
        self._model = model
        self._replicas: dict[str, ReplicaState] = {}
        self._failures: dict[str, StartFailures] = {}
        # When a loading replica comes up, and whether it fails then.
        self._due: dict[str, tuple[float, bool]] = {}
        # When the devices of a stopped replica are free.
        self._stopping: dict[str, float] = {}
        self._last: Observation | None = None

    async def observe(self) -> Observation:
        """What there is now; what a fault makes of it is what there was at the last look."""
        now_s = self._catch_up()
        if self._last is not None and self._strikes(self.faults.stale_observation):
            return replace(self._last, now_s=now_s)
        self._last = Observation(
            now_s=now_s,
            devices=self._devices,
            replicas=tuple(self._seen()),
            failures=dict(self._failures),
        )
        return self._last

    async def apply(self, action: Action) -> None:
        """Do as asked, unless a fault has it otherwise."""
        self._catch_up()
        if self._strikes(self.faults.lost_action):
            return
        self._do(action)
        if self._strikes(self.faults.repeated_action):
            self._do(action)

    def route(self, plan: DeploymentPlan, policy: Policy = Policy.POOLS) -> None:
        """Let the fleet's gateway follow a plan; classes are its workload types, in order."""
        if self._fleet is None:
            return
        self._catch_up()
        shares = {
            index: plan.routing_shares.get(kind.name, {})
            for index, kind in enumerate(plan.workload_types)
        }
        self._fleet.set_routing(policy, shares)

    def crash(self, name: str) -> None:
        """A replica ends without being asked to."""
        if not self._alive(name):
            return
        state, now_s = self._replicas[name], self._clock.now()
        previous = self._failures.get(name)
        count = previous.count + 1 if previous is not None and previous.spec == state.spec else 1
        self._failures[name] = StartFailures(
            spec=state.spec, count=count, last_s=now_s, reason="crashed"
        )
        self._end(name, now_s)

    def _do(self, action: Action) -> None:
        match action:
            case StartReplica(spec=spec):
                self._start(spec)
            case DrainReplica(replica=name):
                if self._alive(name) and self._replicas[name].phase is ReplicaPhase.READY:
                    self._set(name, ReplicaPhase.DRAINING, self._clock.now())
                    if self._fleet is not None:
                        self._fleet.drain(name)
            case StopReplica(replica=name):
                if self._alive(name):
                    self._stop(name, self._clock.now())

    def _start(self, spec: ReplicaSpec) -> None:
        if self._alive(spec.id):
            return
        now_s = self._clock.now()
        if not isinstance(spec.backend, AttachedBackend):
            self._check_devices(spec, now_s)
        slow = self._strikes(self.faults.slow_start)
        ready_s = now_s + self._phases.ready_s * (self.faults.slow_factor if slow else 1.0)
        fails = self._strikes(self.faults.failed_start)
        self._due[spec.id] = (ready_s, fails)
        self._replicas[spec.id] = ReplicaState(
            spec=spec,
            phase=ReplicaPhase.LOADING,
            endpoint=Endpoint(url=f"sim://{spec.id}"),
            since_s=now_s,
        )
        if self._fleet is not None and self._model is not None and not fails:
            model = self._model(spec)
            self._fleet.add_replica(
                spec.id,
                spec.shape,
                model.steps,
                kv_tokens=model.kv_tokens,
                costs=model.costs,
                ready_at_s=ready_s,
                ordered=model.ordered,
                kv_bytes_per_token=model.kv_bytes_per_token,
                link=model.link,
            )

    def _check_devices(self, spec: ReplicaSpec, now_s: float) -> None:
        if not set(spec.devices) <= {device.id for device in self._devices}:
            raise ValueError(f"replica {spec.id} names a device that is not there")
        taken = {
            device
            for name, state in self._replicas.items()
            if self._alive(name)
            for device in state.spec.devices
        }
        if set(spec.devices) & taken:
            raise ValueError(f"replica {spec.id} names a device that is taken")

    def _catch_up(self) -> float:
        """Let all that was due until now happen, in order of time."""
        now_s = self._clock.now()
        while self._crashes and self._crashes[0][0] <= now_s:
            at_s, name = self._crashes.pop(0)
            self._come_up(at_s)
            self._advance(at_s)
            self.crash(name)
        self._come_up(now_s)
        self._advance(now_s)
        return now_s

    def _come_up(self, now_s: float) -> None:
        for name, state in list(self._replicas.items()):
            if self._stopping.get(name, now_s + 1.0) <= now_s:
                self._end(name, self._stopping[name])
                continue
            ready_s, fails = self._due.get(name, (0.0, False))
            if state.phase is ReplicaPhase.LOADING and ready_s <= now_s:
                if fails:
                    self.crash(name)
                else:
                    self._set(name, ReplicaPhase.READY, ready_s)
            elif state.phase is ReplicaPhase.READY and now_s - state.since_s >= self._stable_s:
                self._failures.pop(name, None)

    def _advance(self, now_s: float) -> None:
        if self._fleet is not None:
            self._fleet.advance(now_s)

    def _seen(self) -> list[ReplicaState]:
        if self._fleet is None:
            return list(self._replicas.values())
        loads = {item.name: item for item in self._fleet.replicas()}
        return [
            replace(
                state,
                running=loads[name].running,
                waiting=loads[name].waiting,
                kv_cache_usage=loads[name].kv_usage,
            )
            if name in loads
            else state
            for name, state in self._replicas.items()
        ]

    def _end(self, name: str, now_s: float) -> None:
        self._stopping.pop(name, None)
        self._set(name, ReplicaPhase.GONE, now_s)
        if self._fleet is not None:
            self._fleet.remove(name, replay=self.faults.replay)

    def _stop(self, name: str, now_s: float) -> None:
        if self._phases.stop_s <= 0.0:
            self._end(name, now_s)
        elif name not in self._stopping:
            self._stopping[name] = now_s + self._phases.stop_s
            self._set(name, ReplicaPhase.DRAINING, now_s)
            if self._fleet is not None:
                self._fleet.remove(name, replay=self.faults.replay)

    def _strikes(self, chance: float) -> bool:
        return self._random.random() < chance

    def _alive(self, name: str) -> bool:
        state = self._replicas.get(name)
        return state is not None and state.phase is not ReplicaPhase.GONE

    def _set(self, name: str, phase: ReplicaPhase, now_s: float) -> None:
        self._replicas[name] = replace(self._replicas[name], phase=phase, since_s=now_s)
