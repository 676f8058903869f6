"""Judges switches of a server by its records, in a worker process that lives for one call."""

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from oserve.config import parse_plan
from oserve.core import DeploymentPlan, OServeError
from oserve.evaluate.realised import RealisedCase, RealisedCounts, realised
from oserve.evaluate.switch_scorer import SwitchScorer, model_of
from oserve.evaluate.worker_process import WorkerProcess
from oserve.perf.corrected import Speeds
from oserve.plan.planning import PlanRequest
from oserve.startup.deployment import ServerDeployment, remembered_speeds
from oserve.startup.store import StateStore

# A plan is saved when it is decided; an operator's, when the switch to it has begun.
_SAVED_S = 2.0

_log = logging.getLogger("oserve.look")


@dataclass(frozen=True, slots=True, kw_only=True)
class SwitchJudge:
    """Judges by the simulator of the deployment's plan request."""

    request: PlanRequest
    records: Path
    state_file: Path
    max_model_len: int
    min_gain: float

    def judge(self, plan: str, start_s: float, end_s: float) -> RealisedCounts | None:
        """What a switch to that plan brought between two Unix times; blocks for seconds.

        ``None``: it cannot be judged.
        """
        plans = plans_around(StateStore(self.state_file), plan, start_s)
        if plans is None:
            return None
        speeds: Speeds = remembered_speeds(self.state_file, self.request)
        case = RealisedCase(
            records=self.records,
            old=plans[0],
            new=plans[1],
            start_s=start_s,
            end_s=end_s,
            speeds=speeds,
            max_model_len=self.max_model_len,
            tiers=tuple(tier.name for tier in self.request.tiers),
        )
        worker = WorkerProcess(
            partial(SwitchScorer, model_of(self.request, min_gain=self.min_gain))
        )
        try:
            return worker.call(realised, case)
        except OServeError as error:
            _log.info("the switch to plan %s cannot be judged: %s", plan, error)
            return None
        finally:
            worker.close()


def plans_around(
    store: StateStore, plan: str, start_s: float
) -> tuple[DeploymentPlan, DeploymentPlan] | None:
    """The plans in force before a switch to that plan began, and after; ``None``: not known."""
    other: DeploymentPlan | None = None
    pair: tuple[DeploymentPlan, DeploymentPlan] | None = None
    for at_s, text in store.plans():
        if at_s > start_s + _SAVED_S:
            break
        found = parse_plan(text, place="the saved plans")
        if found.id != plan:
            other = found
        elif other is not None:
            pair = other, found
    return pair


def switch_judge(deployment: ServerDeployment) -> SwitchJudge | None:
    """The judge of a server; ``None`` if there are no step times to simulate with."""
    settings, request, times = deployment.settings, deployment.plan_request, deployment.times
    if request is None or times is None:
        return None
    return SwitchJudge(
        request=request,
        records=Path(settings.gateway.records_file),
        state_file=deployment.state_file,
        max_model_len=times.context,
        min_gain=settings.control.min_gain,
    )
