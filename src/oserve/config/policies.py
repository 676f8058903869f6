"""The policies of the control room, from the settings."""

from oserve.config.settings import Settings
from oserve.control.decision import Mode
from oserve.control.policy import ControlPolicy
from oserve.control.reconcile import ReconcilePolicy


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


def reconcile_policy(settings: Settings) -> ReconcilePolicy:
    """How replicas are restarted and drained."""
    control = settings.control
    return ReconcilePolicy(
        backoff_s=control.backoff_s,
        max_backoff_s=control.max_backoff_s,
        max_failures=control.max_failures,
        drain_limit_s=control.drain_limit_s,
    )
