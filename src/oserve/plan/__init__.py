"""Plan: what a deployment plan must hold true, before anything runs.

It does not know engines or requests; a plan that passes here can be acted on.
"""

from oserve.plan.check import check_plan, default_plan

__all__ = ["check_plan", "default_plan"]
