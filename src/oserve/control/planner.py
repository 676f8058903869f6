"""Plans and their values from a table of capacities: the planner of the controller.

Pure. The table is made once: only rates change. Shapes may be barred, and devices left out.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from oserve.control.evaluation import Leg, TypeRates
from oserve.control.ladder import Shapes
from oserve.control.plan_parts import (
    even_shares,
    fitting_rows,
    plan_gain,
    plan_stamp,
    restart_legs,
    scaled_row,
    whole_shares,
)
from oserve.core import (
    DeploymentPlan,
    Device,
    LengthClass,
    OServeError,
    PlannedType,
    ReplicaShape,
    ReplicaSpec,
    WorkloadType,
)
from oserve.perf import ShapePerformance
from oserve.perf.corrected import Speeds
from oserve.plan.assign import Assigner
from oserve.plan.deploy import place_deployment
from oserve.plan.place import place_replicas
from oserve.plan.problem import AmongEquals, PlanProblem
from oserve.plan.redundancy import place_redundantly
from oserve.plan.search import DeploymentCandidate, Planned, Search, plan_deployment
from oserve.plan.serving import Serving

# Rates below these are noise, and bad coefficients for a linear programme.
_LEAST_PART = 1e-6
_LEAST_RPS = 1e-9
_MOST_SERVINGS = 512
_MOST_SWITCHES = 64
# The device time of a token where no shape's capacity for a type is known.
_UNKNOWN_S_PER_TOKEN = 1e-3
# Homogeneous deployments are candidates, too, if they serve this part of what the best one serves.
# The table errs by about as much.
_MOST_NEAR, _NEAR = 6, 0.85


Legs = Callable[[Sequence[ReplicaSpec], Sequence[ReplicaSpec]], Sequence[Leg] | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannerFacts:
    """What plans are made from.

    ``types``: the workload types; their rates do not matter. ``centres`` of the types are (prompt,
    output) in tokens. ``classes`` and ``class_mix``: see ``plan.demand``. ``table``: the shapes to
    plan with. ``row_of`` returns the row of a shape that is not in the table, or ``None`` if
    nothing is known. ``start_s``: seconds until a replica serves. ``legs`` returns a switch without
    restarts, or ``None`` where there is none. A plan of different shapes must gain ``min_gain``
    over the best homogeneous one; with ``min_shapes`` above 1, a homogeneous plan is used only if
    there is no other. ``spread``: see ``plan.redundancy``. ``rows_at``: the rows of shapes by the
    table's model at other speeds; ``None``: the table is never corrected.
    """

    devices: tuple[Device, ...]
    types: tuple[WorkloadType, ...]
    centres: tuple[tuple[float, float], ...]
    classes: tuple[LengthClass, ...]
    class_mix: Mapping[str, Mapping[str, float]]
    table: tuple[ShapePerformance, ...]
    row_of: Callable[[ReplicaSpec], ShapePerformance | None]
    start_s: Callable[[ReplicaSpec], float]
    legs: Legs | None = None
    min_gain: float = 0.03
    time_limit_s: float = 5.0
    enough_scale: float | None = None
    among_equals: AmongEquals = AmongEquals.FEWEST_DEVICES
    rows_at: Callable[[Sequence[ReplicaShape], Speeds], Sequence[ShapePerformance]] | None = None
    min_shapes: int = 1
    spread: float = 0.0


class TablePlanner:
    """Implements ``evaluation.SwitchPlanner`` with linear programmes over a table."""

    def __init__(self, facts: PlannerFacts) -> None:
        self.facts = facts
        self.barred: frozenset[ReplicaShape] = frozenset()
        self.unusable: frozenset[str] = frozenset()
        self.devices = facts.devices
        self.most_s = float("inf")  # Of a search; a decision about nodes lowers it.
        self.speeds = Speeds()
        self._table = facts.table
        self._rows = {row.shape: row for row in facts.table}
        # Rows of shapes that are not in the table, at the speeds that the table was made for.
        self._chosen: dict[ReplicaShape, ShapePerformance] = {}
        self._servings: dict[tuple[tuple[ReplicaShape, int], ...], Serving] = {}
        self._switches: dict[
            tuple[frozenset[ReplicaSpec], Shapes], tuple[DeploymentPlan, Sequence[Leg]]
        ] = {}

    def learn(self, facts: PlannerFacts) -> None:
        """Use other facts from now on; the workload types must be the same."""
        self.facts = facts
        self._chosen = {}
        self.leave_out(self.unusable)
        self.correct(self.speeds)

    def leave_out(self, unusable: frozenset[str]) -> None:
        """Plan without these devices from now on."""
        self.unusable, self._switches = unusable, {}
        self.devices = tuple(item for item in self.facts.devices if item.id not in unusable)

    def correct(self, speeds: Speeds) -> None:
        """Use these speeds from now on, in place of any before."""
        self.speeds = speeds
        self._table = self._at_speed(self.facts.table)
        # Another thread may be scoring plans and must find every shape.
        chosen = {
            shape: replace(self._at_speed([row])[0], shape=shape)
            for shape, row in dict(self._chosen).items()
        }
        self._rows = chosen | {row.shape: row for row in self._table}
        self._servings = {}

    def _at_speed(self, rows: Sequence[ShapePerformance]) -> tuple[ShapePerformance, ...]:
        """The rows at the observed speeds.

        Capacities change by the same factor as those of the table's model, even if they come from
        simulations.
        """
        make, speeds = self.facts.rows_at, self.speeds
        if make is None or not speeds.known:
            return tuple(rows)
        shapes = [row.shape for row in rows]
        before = {row.shape: row for row in make(shapes, Speeds())}
        after = {row.shape: row for row in make(shapes, speeds)}
        return tuple(
            scaled_row(row, before[row.shape], after[row.shape])
            if row.shape in before and row.shape in after
            else row
            for row in rows
        )

    # -- plans ----------------------------------------------------------------------------------
    def candidates(self, rates_rps: TypeRates, current: DeploymentPlan) -> Sequence[DeploymentPlan]:
        """The best plan for these rates, then homogeneous ones near it; none if no shape serves."""
        facts = self.facts
        table = tuple(row for row in self._table if row.shape not in self.barred)
        if self.unusable:
            table = fitting_rows(table, self.devices)
        types = self._rated(rates_rps, table)
        if not table or not any(kind.arrival_rate_rps > 0 for kind in types):
            return ()
        problem = PlanProblem(
            devices=self.devices,
            types=types,
            options=table,
            enough_scale=facts.enough_scale,
            among_equals=facts.among_equals,
            current=current,
            min_shapes=facts.min_shapes,
        )
        try:
            limit_s = min(facts.time_limit_s, self.most_s)
            planned = plan_deployment(problem, Search.EXACT, time_limit_s=limit_s, candidates=0)
        except OServeError:
            return ()
        found: dict[frozenset[ReplicaSpec], DeploymentPlan] = {}
        best, *near = self._near_best(problem, planned)
        choice = place_redundantly(problem, planned, best, spread=facts.spread)
        for deployment in (choice.deployment, *near):
            plan = self._placed(problem, deployment, current)
            found.setdefault(frozenset(plan.replicas), plan)
        return tuple(found.values())

    def _near_best(self, problem: PlanProblem, planned: Planned) -> list[DeploymentCandidate]:
        """The best deployment, and the homogeneous ones that come near it."""
        best, plain = planned.best, planned.homogeneous[0]
        if self.facts.min_shapes > 1 and problem.is_varied(best.counts):
            return [best]
        if plan_gain(best, plain) < self.facts.min_gain:
            best = plain
        near = [
            item
            for item in planned.homogeneous[:_MOST_NEAR]
            if item.score.served_rps >= _NEAR * best.score.served_rps
            and item.score.scale >= _NEAR * best.score.scale
        ]
        return [best, *near]

    def _placed(
        self, problem: PlanProblem, deployment: DeploymentCandidate, current: DeploymentPlan
    ) -> DeploymentPlan:
        """Place a deployment on devices, as close to the current plan as possible."""
        placed = place_deployment(problem, deployment)
        replicas = (*placed.replicas, *self._fixed(current))
        if set(replicas) == set(current.replicas):
            return current
        plan = DeploymentPlan(
            id=f"planned-{plan_stamp(replicas)}",
            replicas=replicas,
            length_classes=self.facts.classes,
            routing_shares={},
        )
        return self.with_shares(plan, placed.routing_shares)

    def deployment(self, shapes: Shapes, current: DeploymentPlan) -> DeploymentPlan:
        """Place a deployment near the current plan; every replica serves every type."""
        placed = place_replicas(shapes, self.devices, current=current).replicas
        placed += self._fixed(current)
        if set(placed) == set(current.replicas):
            return current
        plan = replace(
            current, id=f"ladder-{plan_stamp(placed)}", replicas=placed, routing_shares={}
        )
        return self.evenly_shared(plan)

    def _fixed(self, current: DeploymentPlan) -> tuple[ReplicaSpec, ...]:
        """Replicas on devices that are left out: they serve on."""
        return tuple(s for s in current.replicas if not self.unusable.isdisjoint(s.devices))

    def evenly_shared(self, plan: DeploymentPlan) -> DeploymentPlan:
        """The plan with all replicas in the pool of every type."""
        even = even_shares([spec.id for spec in plan.replicas])
        return self.with_shares(plan, {kind.name: even for kind in self.facts.types})

    def switch(
        self, current: DeploymentPlan, shapes: Shapes
    ) -> tuple[DeploymentPlan, Sequence[Leg]]:
        """A deployment near the current plan, and the legs of the switch to it.

        Found again until the current plan is another one: a switch teaches how long phases take.
        """
        origin = frozenset(current.replicas)
        key = (origin, shapes)
        found = self._switches.get(key)
        if found is None:
            held = {own: item for own, item in self._switches.items() if own[0] == origin}
            held = {} if len(held) >= _MOST_SWITCHES else held
            plan = self.deployment(shapes, current)
            found = (plan, tuple(self.legs(current.replicas, plan.replicas)))
            # Another thread may be reading.
            self._switches = {**held, key: found}
        return found

    @property
    def work(self) -> tuple[float, ...]:
        """The work of a request of each type: the least device-seconds that any shape needs."""
        found = []
        for column, (prompt, output) in enumerate(self.facts.centres):
            own = [
                row.shape.device_count / row.capacity_rps[column]
                for row in self._table
                if row.capacity_rps[column] > 0
            ]
            found.append(min(own) if own else (prompt + output) * _UNKNOWN_S_PER_TOKEN)
        return tuple(found)

    def floor(self, rates_rps: TypeRates, current: DeploymentPlan, replicas: int) -> DeploymentPlan:
        """Cut the current plan to the replicas that serve most of these rates, chosen greedily."""
        rates = rates_rps if sum(rates_rps) > 0 else tuple(1.0 for _ in rates_rps)
        kept: list[ReplicaSpec] = []
        left = list(current.replicas)
        while left and len(kept) < replicas:
            best = max(left, key=lambda spec: self.served_rps([*kept, spec], rates))
            left.remove(best)
            kept.append(best)
        plan = replace(current, id=f"floor-{plan_stamp(kept)}", replicas=tuple(kept))
        return self.with_shares(plan, self.shares(kept, rates))

    def with_shares(
        self, plan: DeploymentPlan, shares: Mapping[str, Mapping[str, float]]
    ) -> DeploymentPlan:
        """The plan with these shares by type, and the shares by length class that follow."""
        names = {spec.id for spec in plan.replicas}
        even = {name: 1.0 / len(names) for name in sorted(names)}
        own = {kind: whole_shares(given) or even for kind, given in shares.items()}
        routing: dict[str, dict[str, float]] = {}
        for item in self.facts.classes:
            mixed: dict[str, float] = {}
            for kind, part in self.facts.class_mix[item.name].items():
                for name, share in own[kind].items():
                    mixed[name] = mixed.get(name, 0.0) + part * share
            routing[item.name] = whole_shares(mixed) or even
        return replace(
            plan,
            length_classes=self.facts.classes,
            routing_shares=routing,
            planned_types=tuple(
                PlannedType(
                    name=kind.name,
                    prompt_tokens=prompt,
                    output_tokens=output,
                    shares=own[kind.name],
                    tier=kind.tier,
                )
                for kind, (prompt, output) in zip(self.facts.types, self.facts.centres, strict=True)
            ),
        )

    # -- values ---------------------------------------------------------------------------------
    def served_rps(self, replicas: Sequence[ReplicaSpec], rates_rps: TypeRates) -> float:
        """See ``SwitchPlanner``. Replicas of unknown shapes serve nothing."""
        counts = Counter(spec.shape for spec in replicas if self._row(spec) is not None)
        key = tuple(sorted(counts.items(), key=lambda item: repr(item[0])))
        serving = self._servings.get(key)
        if serving is None:
            if len(self._servings) >= _MOST_SERVINGS:
                self._servings.clear()
            rows = [self._rows[shape].capacity_rps for shape, _ in key]
            serving = Serving(rows, [count for _, count in key])
            self._servings[key] = serving
        return serving.served_rps(rates_rps)

    def shares(
        self, replicas: Sequence[ReplicaSpec], rates_rps: TypeRates
    ) -> dict[str, dict[str, float]]:
        """Routing shares of each type over replicas that serve now, for these rates.

        A type without requests goes where it is cheapest.
        """
        known = [spec for spec in replicas if self._row(spec) is not None]
        ids: dict[ReplicaShape, list[str]] = {}
        for spec in known:
            ids.setdefault(spec.shape, []).append(spec.id)
        if len(ids) > 1 and (found := self._solved_shares(ids, rates_rps)) is not None:
            even = even_shares([spec.id for spec in replicas])
            return {name: whole_shares(own) or dict(even) for name, own in found.items()}
        # With one shape all replicas are equal; without known shapes, they cannot be distinguished.
        even = even_shares([spec.id for spec in (known if len(ids) == 1 else replicas)])
        return {kind.name: dict(even) for kind in self.facts.types}

    def _solved_shares(
        self, ids: Mapping[ReplicaShape, Sequence[str]], rates_rps: TypeRates
    ) -> dict[str, dict[str, float]] | None:
        """Shares by the linear programme; ``None`` where no shape serves any type."""
        table = tuple(self._rows[shape] for shape in ids)
        for rates in (rates_rps, tuple(1.0 for _ in rates_rps)):
            types = self._rated(rates, table)
            if any(kind.arrival_rate_rps > 0 for kind in types):
                break
        else:
            return None
        problem = PlanProblem(devices=self.facts.devices, types=types, options=table)
        found = Assigner(problem).assign([len(names) for names in ids.values()])
        return {
            kind.name: {
                replica: row[column] / len(group)
                for row, group in zip(found.shares, ids.values(), strict=True)
                for replica in group
            }
            for column, kind in enumerate(self.facts.types)
        }

    def legs(self, old: Sequence[ReplicaSpec], new: Sequence[ReplicaSpec]) -> Sequence[Leg]:
        """A switch without restarts where possible, else the stages of a roll-out."""
        found = None if self.facts.legs is None else self.facts.legs(old, new)
        if found is not None:
            return found
        return restart_legs(old, new, self.facts.start_s)

    def stay_s(self, replicas: Sequence[ReplicaSpec], rates_rps: TypeRates) -> float:
        """The mean latency of the types at these rates, over the replicas that serve them."""
        rows = [row for spec in replicas if (row := self._row(spec)) is not None]
        total = weight = 0.0
        for column, rate in enumerate(rates_rps):
            own = [row.latency_s[column] for row in rows if row.capacity_rps[column] > 0]
            if own and rate > 0:
                total += rate * sum(own) / len(own)
                weight += rate
        return total / weight if weight > 0 else 0.0

    def _row(self, spec: ReplicaSpec) -> ShapePerformance | None:
        row = self._rows.get(spec.shape)
        if row is None and (found := self.facts.row_of(spec)) is not None:
            self._chosen[spec.shape] = found
            row = replace(self._at_speed([found])[0], shape=spec.shape)
            self._rows[spec.shape] = row
        return row

    def _rated(
        self, rates_rps: TypeRates, table: Sequence[ShapePerformance]
    ) -> tuple[WorkloadType, ...]:
        """The types at these rates; 0 for noise and for types that no shape serves."""
        least = max(_LEAST_RPS, _LEAST_PART * sum(rates_rps))
        return tuple(
            replace(
                kind,
                arrival_rate_rps=rate
                if rate > least and any(row.capacity_rps[column] > 0 for row in table)
                else 0.0,
            )
            for column, (kind, rate) in enumerate(zip(self.facts.types, rates_rps, strict=True))
        )
