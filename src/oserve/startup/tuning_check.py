"""Whether a server can tune its constants, checked before anything starts."""

from oserve.config import Settings
from oserve.control.decision import Mode
from oserve.core import AttachedBackend, DeploymentPlan, OServeError
from oserve.startup.first_plan import NoStepTimes, StepTimes


def check_tuning(settings: Settings, plan: DeploymentPlan, times: StepTimes | NoStepTimes) -> None:
    """Raise OServeError if ``control.tune`` is on and the plan cannot be simulated."""
    if settings.control.tune is Mode.OFF:
        return
    planning = settings.planning
    reason = ""
    if isinstance(times, NoStepTimes):
        reason = times.reason
    elif any(isinstance(spec.backend, AttachedBackend) for spec in plan.replicas):
        reason = "a replica of the plan is attached"
    elif planning.slo_ttft_ms is None and planning.slo_tpot_ms is None:
        reason = "there is no SLO: planning.slo_ttft_ms, planning.slo_tpot_ms"
    if reason:
        raise OServeError(
            f"the server cannot tune: {reason}",
            place="control.tune",
            remedy="set it to off, or see docs/control.md for what is needed",
        )
