"""Perf: the performance of one replica shape.

This package knows neither running requests nor plans. Costs are the engine seconds that a token
occupies in a full batch, so that work adds up: a replica with 3 s of outstanding work is idle in
about 3 s.
"""

from oserve.perf.costs import TokenCosts, token_costs
from oserve.perf.table import ShapePerformance

__all__ = ["ShapePerformance", "TokenCosts", "token_costs"]
