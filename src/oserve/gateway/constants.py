"""The constants of dispatch that the settings of a gateway give."""

from oserve.control.dispatch.constants import DispatchConstants
from oserve.control.dispatch.fair_policy import FairPolicy
from oserve.control.dispatch.order import OrderPolicy
from oserve.control.dispatch.overload import OverloadPolicy
from oserve.control.dispatch.policy import DispatchPolicy
from oserve.gateway.settings import GatewaySettings

FIRST_COME = OrderPolicy(penalty_s_per_token=0.0, freshest_first_s=0.0, max_client_steps=0)
"""The order whose rank is the arrival alone."""


def constants_of(settings: GatewaySettings) -> DispatchConstants:
    """The constants that the gateway's settings give."""
    order, overload = settings.order, settings.overload
    ranked = OrderPolicy(
        penalty_s_per_token=order.penalty_s_per_1000_tokens / 1000.0,
        max_penalty_s=order.max_penalty_s,
        freshest_first_s=order.freshest_first_s,
        client_step_s=order.client_step_s,
        max_client_steps=order.max_client_steps,
    )
    return DispatchConstants(
        order=ranked if order.policy == "priority" else FIRST_COME,
        overload=OverloadPolicy(
            ttft_s=overload.ttft_ms / 1e3 if overload.demote and overload.ttft_ms else None,
            shed_after_s=overload.shed_after_ms / 1e3 if overload.shed_after_ms else None,
            owed_of_ttft=overload.owed_of_ttft,
            late_of_ttft=overload.late_of_ttft,
        ),
        overflow_s=settings.overflow_s,
        inflight_per_device=settings.inflight_per_device,
    )


def policy_of(settings: GatewaySettings) -> DispatchPolicy:
    """The dispatch policy that follows from the gateway's settings."""
    constants, move = constants_of(settings), settings.move
    return DispatchPolicy(
        max_queued=settings.max_queued,
        max_attempts=settings.max_attempts,
        max_moves=move.max_moves,
        request_timeout_s=settings.request_timeout_s,
        no_replica_wait_s=settings.no_replica_wait_s,
        overflow_s=constants.overflow_s,
        drain_limit_s=move.drain_limit_s,
        overload=constants.overload,
        processes=settings.processes,
        fair=FairPolicy(
            weights={name: item.weight for name, item in settings.tenancy.tenants.items()},
            default_weight=settings.tenancy.default.weight,
            debt_s=settings.tenancy.locality_s,
            reserve=settings.tenancy.reserve,
        ),
    )
