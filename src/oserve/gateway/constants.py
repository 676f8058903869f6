"""The constants of dispatch that the settings of a gateway give."""

from oserve.control.dispatch.constants import DispatchConstants
from oserve.control.dispatch.order import OrderPolicy
from oserve.control.dispatch.overload import OverloadPolicy
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
