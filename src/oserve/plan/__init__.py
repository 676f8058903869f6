"""Plan: planning and validation of deployments.

This package knows neither engines nor requests. A plan that passes ``check_plan`` can be executed.
"""

from oserve.plan.check import check_plan, default_plan

__all__ = ["check_plan", "default_plan"]
