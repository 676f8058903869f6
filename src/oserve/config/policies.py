"""The policies of the control room, from the settings."""

from collections.abc import Sequence

from oserve.config.settings import PlanningSettings, Settings
from oserve.control.decision import Mode
from oserve.control.following import FollowPolicy
from oserve.control.ladder import Goal
from oserve.control.policy import ControlPolicy
from oserve.control.reconcile import ReconcilePolicy
from oserve.core import Objective, OServeError


def control_policy(settings: Settings, mode: Mode) -> ControlPolicy:
    """When the controller decides, and what a switch must be worth."""
    control, gateway = settings.control, settings.gateway
    moves = gateway.move.drain_limit_s if gateway.move.max_moves else None
    limit_ms = gateway.overload.ttft_ms or settings.planning.slo_ttft_ms
    demotes = gateway.overload.demote and limit_ms is not None
    return ControlPolicy(
        mode=mode,
        interval_s=control.decision_interval_s,
        now_s=min(30, control.decision_interval_s),
        min_dwell_s=control.min_dwell_s,
        max_switches_per_hour=control.max_switches_per_hour,
        min_gain=control.min_gain,
        margin=control.margin,
        lasts_s=control.lasts_s,
        shrink_after_s=control.shrink_after_s,
        floor_replicas=control.floor_replicas,
        hold_s=control.hold_s,
        drain_limit_s=control.drain_limit_s if moves is None else moves,
        in_order=gateway.order.freshest_first_s == 0 and not demotes,
    )


def ladder_goal(
    planning: PlanningSettings, names: Sequence[str], *, place: str = "planning.type_objectives"
) -> Goal:
    """The objective of each workload type.

    Raises OServeError, at ``place``, for a type that does not exist.
    """
    unknown = [name for name in planning.type_objectives if name not in names]
    if unknown:
        raise OServeError(
            f"no workload type is called {unknown[0]!r}",
            place=place,
            remedy="the types are " + ", ".join(names),
        )
    return Goal(
        objectives=tuple(planning.type_objectives.get(name, planning.objective) for name in names),
        attainment=planning.attainment,
    )


def follow_policy(settings: Settings, names: Sequence[str]) -> FollowPolicy | None:
    """How the controller follows the load; ``None`` if it plans for capacity alone."""
    planning, control = settings.planning, settings.control
    goal = ladder_goal(planning, names)
    if not control.simulate or set(goal.objectives) == {Objective.CAPACITY}:
        return None
    return FollowPolicy(
        goal=goal,
        headroom=planning.headroom,
        quantile=planning.quantile,
        fall_after_s=control.fall_after_s,
    )


def reconcile_policy(settings: Settings) -> ReconcilePolicy:
    """How replicas are restarted and drained."""
    control = settings.control
    return ReconcilePolicy(
        backoff_s=control.backoff_s,
        max_backoff_s=control.max_backoff_s,
        max_failures=control.max_failures,
        drain_limit_s=control.drain_limit_s,
    )
