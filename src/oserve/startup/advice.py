"""A decision as the answer to an operator."""

from typing import Any

import msgspec

from oserve.config import plan_yaml
from oserve.control.decision import Decision, DecisionVerdict
from oserve.control.evaluation import CandidateScore
from oserve.control.following import FollowScore


def advised(decision: Decision, weighed: CandidateScore | FollowScore | None) -> dict[str, Any]:
    """The answer to an operator: the decision, and the evaluated plan as a plan file."""
    plan = "" if weighed is None else plan_yaml(weighed.plan, head=decision.line)
    return {
        "decision": msgspec.to_builtins(decision),
        "line": decision.line,
        "switched": decision.verdict is DecisionVerdict.SWITCH,
        "plan": plan,
    }
