"""Perf: what one replica shape can do.

It does not know requests in flight or plans. Costs here are engine seconds a token occupies in a
full batch, so that work adds up: a replica owing 3 s of work is about 3 s from idle.
"""

from oserve.perf.costs import TokenCosts, token_costs
from oserve.perf.table import ShapePerformance

__all__ = ["ShapePerformance", "TokenCosts", "token_costs"]
