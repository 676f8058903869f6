"""A linear or mixed-integer programme in HiGHS, built once, modified and solved repeatedly.

Single-threaded and silent. It knows columns, rows and coefficients but no replicas; callers scale
their numbers to about 1, so that the solver's absolute tolerances are meaningful.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import highspy
import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A variable: its bounds, its cost and its coefficients by row index."""

    entries: Mapping[int, float]
    cost: float = 0.0
    lower: float = 0.0
    upper: float = math.inf
    integer: bool = False


class SolveStatus(StrEnum):
    """How a solve ended."""

    OPTIMAL = "optimal"
    FEASIBLE = "feasible"
    INFEASIBLE = "infeasible"
    UNKNOWN = "unknown"


class LinearProgramme:
    """Maximise cost @ x over columns x with ``lower <= rows @ x <= upper``.

    ``rows`` are (lower, upper) pairs. Without integer columns the dual simplex starts from the last
    basis, so that a solve after a change of bounds is cheap.
    """

    def __init__(
        self,
        *,
        columns: Sequence[Column],
        rows: Sequence[tuple[float, float]],
        relative_gap: float = 1e-6,
        seed: int = 0,
    ) -> None:
        self._integer = any(column.integer for column in columns)
        self._width = len(columns)
        self._costs = np.array([column.cost for column in columns])
        self._highs: Any = highspy.Highs()
        options = {
            "output_flag": False,
            "threads": 1,
            "parallel": "off",
            "random_seed": seed,
            "primal_feasibility_tolerance": 1e-9,
            "dual_feasibility_tolerance": 1e-9,
            "mip_feasibility_tolerance": 1e-8,
            "mip_rel_gap": relative_gap,
            "mip_abs_gap": 0.0,
            # These heuristics cost more than they gain on such small programmes.
            "mip_heuristic_run_feasibility_jump": False,
            "mip_heuristic_run_rins": False,
            "mip_heuristic_run_rens": False,
        }
        for name, value in options.items():
            self._highs.setOptionValue(name, value)
        if not self._integer:
            self._highs.setOptionValue("presolve", "off")
        self._highs.passModel(_model(columns, rows, self._costs))

    def set_rows(self, first: int, lower: Vector, upper: Vector) -> None:
        """New bounds for consecutive rows from ``first`` on."""
        indices = np.arange(first, first + len(lower), dtype=np.int32)
        self._highs.changeRowsBounds(len(lower), indices, lower, upper)

    def set_costs(self, costs: Vector) -> None:
        """New costs for all columns."""
        self._costs = costs
        indices = np.arange(self._width, dtype=np.int32)
        self._highs.changeColsCost(self._width, indices, costs)

    def solve(self, *, time_limit_s: float = math.inf, presolve: bool = True) -> SolveStatus:
        """Solve within about ``time_limit_s`` seconds (HiGHS's own clock).

        ``presolve`` concerns mixed-integer programmes only; without it HiGHS reaches the same
        answer in another way.
        """
        if self._integer:
            self._highs.setOptionValue("presolve", "choose" if presolve else "off")
            self._highs.setOptionValue("time_limit", max(0.0, time_limit_s))
        self._highs.run()
        status = self._highs.getModelStatus()
        if status == highspy.HighsModelStatus.kOptimal:
            return SolveStatus.OPTIMAL
        if status == highspy.HighsModelStatus.kInfeasible:
            return SolveStatus.INFEASIBLE
        if self._integer:
            feasible = self._highs.getInfo().primal_solution_status == 2
            return SolveStatus.FEASIBLE if feasible else SolveStatus.UNKNOWN
        # The basis is unusable: solve once more from scratch.
        self._highs.clearSolver()
        self._highs.run()
        solved = self._highs.getModelStatus() == highspy.HighsModelStatus.kOptimal
        return SolveStatus.OPTIMAL if solved else SolveStatus.UNKNOWN

    def relaxed_value(self) -> float:
        """The optimum of the relaxation, which is a bound; infinite if unsolved."""
        self._highs.setOptionValue("solve_relaxation", True)
        self._highs.setOptionValue("time_limit", math.inf)
        self._highs.run()
        solved = self._highs.getModelStatus() == highspy.HighsModelStatus.kOptimal
        value = self.value if solved else math.inf
        self._highs.setOptionValue("solve_relaxation", False)
        return value

    @property
    def seconds(self) -> float:
        """The total time of all solves, by HiGHS's clock."""
        return float(self._highs.getRunTime())

    @property
    def value(self) -> float:
        """The objective of the last solve."""
        return float(self._highs.getInfo().objective_function_value)

    @property
    def bound(self) -> float:
        """The upper bound of the last mixed-integer solve."""
        bound = float(self._highs.getInfo().mip_dual_bound)
        return max(bound, self.value) if math.isfinite(bound) else math.inf

    @property
    def values(self) -> Vector:
        """The columns of the last solution."""
        return np.array(self._highs.getSolution().col_value)

    @property
    def prices(self) -> Vector:
        """The absolute dual of each row: change of the objective per unit of the row's bound."""
        duals: Vector = np.array(self._highs.getSolution().row_dual)
        return np.abs(duals)


def _model(columns: Sequence[Column], rows: Sequence[tuple[float, float]], costs: Vector) -> Any:
    model: Any = highspy.HighsLp()
    model.num_col_ = len(columns)
    model.num_row_ = len(rows)
    model.sense_ = highspy.ObjSense.kMaximize
    model.col_cost_ = costs
    model.col_lower_ = np.array([column.lower for column in columns])
    model.col_upper_ = np.array([column.upper for column in columns])
    model.row_lower_ = np.array([lower for lower, _ in rows])
    model.row_upper_ = np.array([upper for _, upper in rows])
    kinds = highspy.HighsVarType
    if any(column.integer for column in columns):
        model.integrality_ = [
            kinds.kInteger if column.integer else kinds.kContinuous for column in columns
        ]
    starts = [0]
    indices: list[int] = []
    values: list[float] = []
    for column in columns:
        indices.extend(column.entries.keys())
        values.extend(column.entries.values())
        starts.append(len(indices))
    model.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    model.a_matrix_.start_ = np.array(starts, dtype=np.int32)
    model.a_matrix_.index_ = np.array(indices, dtype=np.int32)
    model.a_matrix_.value_ = np.array(values, dtype=np.float64)
    return model
