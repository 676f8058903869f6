"""Decisions and states in words, for people who do not know the code."""

from collections.abc import Mapping
from typing import Any

REASONS: Mapping[str, str] = {
    "no_data": "no request has been observed",
    "no_plan": "no deployment that can start serves the expected traffic",
    "same_plan": "the present plan is the best",
    "switch_under_way": "the last switch has not ended",
    "minimum_dwell": "the last switch was too short a time ago",
    "switch_limit": "there were too many switches this hour",
    "held": "an operator's plan is held",
    "below_present_need": "the candidate would serve less of the present traffic",
    "gain_too_small": "the gain is too small",
    "cost_exceeds_gain": "the switch would cost more than it gains",
    "not_long_enough": "the traffic has not lasted long enough for a switch to pay",
    "gain_exceeds_cost": "the gain exceeds the cost",
    "zero_traffic": "no request arrives",
    "manual": "an operator asked for it",
    "no_ladder": "the ladder of deployments is being prepared",
    "overloaded": "no deployment holds the load",
    "load_rises": "the load rises above what the present deployment holds",
    "objective_gains": "another deployment serves this load better",
    "nodes_changed": "nodes left or came back",
}
VERDICTS: Mapping[str, str] = {
    "keep": "kept the plan",
    "switch": "switched",
    "advise": "would switch, but the mode is advise",
}


def why(decision: Mapping[str, Any]) -> str:
    """Verdict and reason of a decision: "kept the plan: the gain is too small"."""
    verdict, reason = str(decision["verdict"]), str(decision["reason"])
    return f"{VERDICTS.get(verdict, verdict)}: {REASONS.get(reason, reason.replace('_', ' '))}"


def standing(status: Mapping[str, Any]) -> str:
    """The state of the fleet in a few words."""
    replicas = status.get("replicas", [])
    ready = sum(item["phase"] == "ready" for item in replicas)
    loading = sum(item["phase"] in {"loading", "standby"} for item in replicas)
    draining = sum(item["phase"] == "draining" for item in replicas)
    if not status.get("serving"):
        begins = "Not serving"
    elif status.get("given_up"):
        begins = "Serving, with replicas given up"
    else:
        begins = "Serving"
    parts = [f"{ready} {'replica' if ready == 1 else 'replicas'} ready"]
    parts += [f"{loading} loading"] if loading else []
    parts += [f"{draining} draining"] if draining else []
    parts += [f"{len(status['given_up'])} given up"] if status.get("given_up") else []
    return f"{begins}: {', '.join(parts)}"
