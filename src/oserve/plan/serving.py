"""The rate that given replicas serve under changing demand: one small, re-solved linear programme.

The lower level of ``assign`` with the demand on the right-hand side, so that only bounds change
between solves and each starts from the last basis:

    maximise sum of capacity[i, j] * busy[i, j]
    subject to sum over j of busy[i, j] <= count[i],  sum over i of capacity * busy <= rate[j]
"""

import math
from collections.abc import Sequence

import numpy as np

from oserve.plan.programme import Column, LinearProgramme, SolveStatus


class Serving:
    """Groups of identical replicas: ``counts[i]`` of them, each with ``capacity_rps[i][j]``."""

    def __init__(self, capacity_rps: Sequence[Sequence[float]], counts: Sequence[int]) -> None:
        capacity = np.array(capacity_rps, dtype=np.float64)
        groups, types = capacity.shape if capacity.size else (0, 0)
        self._unit = capacity.max(axis=0) if groups else np.zeros(types)
        self._able = self._unit > 0
        self._first = groups
        self._scale = float(self._unit.max(initial=0.0))
        self._programme: LinearProgramme | None = None
        if self._scale <= 0.0:
            return
        columns = [
            Column(
                entries={i: 1.0, groups + j: capacity[i, j] / self._unit[j]},
                cost=capacity[i, j] / self._scale,
            )
            for i in range(groups)
            for j in range(types)
            if capacity[i, j] > 0
        ]
        rows = [(-math.inf, float(count)) for count in counts] + [(-math.inf, 0.0)] * types
        self._programme = LinearProgramme(columns=columns, rows=rows)

    def served_rps(self, rates_rps: Sequence[float]) -> float:
        """The largest total rate served within the limits, in requests/s."""
        if self._programme is None:
            return 0.0
        rates = np.asarray(rates_rps, dtype=np.float64)
        upper = np.where(self._able, rates / np.where(self._able, self._unit, 1.0), 0.0)
        self._programme.set_rows(self._first, np.full(len(rates), -math.inf), upper)
        if self._programme.solve() is not SolveStatus.OPTIMAL:
            return 0.0
        served = self._programme.value * self._scale
        return float(min(max(served, 0.0), rates[self._able].sum()))
