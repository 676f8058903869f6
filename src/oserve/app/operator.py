"""What an operator may ask for over HTTP: plans that give nobody powers that they had not before.

Whoever may send requests may send plans, so a plan from there may not name what reaches beyond the
replicas: an engine's own arguments, other servers and the variables that hold their keys must be
in the plan in force already. Plans with more are given at the start.
"""

from collections.abc import Sequence

from oserve.config import parse_plan
from oserve.core import AttachedBackend, DeploymentPlan, Device, OServeError, VllmBackend
from oserve.plan import check_plan

_PLACE = "plan"


class RefusedError(Exception):
    """It cannot be done here; the text says why."""


def allowed_plan(body: bytes, current: DeploymentPlan, devices: Sequence[Device]) -> DeploymentPlan:
    """The plan in the body of a call. Raises OServeError for one that is wrong or goes too far."""
    plan = parse_plan(body.decode("utf-8", errors="replace"), place=_PLACE)
    check_plan(plan, devices, place=_PLACE)
    known = {spec.backend for spec in current.replicas} | {VllmBackend()}
    for index, spec in enumerate(plan.replicas):
        if spec.backend not in known:
            field = "attach" if isinstance(spec.backend, AttachedBackend) else "engine_args"
            raise OServeError(
                "a plan from outside may not bring one that is not in force already",
                place=f"{_PLACE}.replicas[{index}].{field}",
                remedy="start the server with this plan",
            )
    return plan
