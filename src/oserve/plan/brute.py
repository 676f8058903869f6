"""Brute force over every deployment that fits: the oracle of the tests, for small clusters."""

from itertools import islice

import numpy as np

from oserve.core import OServeError
from oserve.plan.assign import Assigner
from oserve.plan.bounds import Bounds, ScoredCounts
from oserve.plan.problem import PlanProblem

MOST_DEPLOYMENTS = 2_000_000


def brute_force(problem: PlanProblem, assigner: Assigner) -> ScoredCounts:
    """The best deployment by enumeration.

    Raises OServeError if more than ``MOST_DEPLOYMENTS`` fit.
    """
    packing = problem.packing
    every = list(islice(packing.all_counts(), MOST_DEPLOYMENTS + 1))
    if len(every) > MOST_DEPLOYMENTS:
        raise OServeError(
            f"more than {MOST_DEPLOYMENTS:,} deployments fit on {packing.describe()}",
            place="plan.search",
            remedy="use the exact search, which needs no enumeration",
        )
    eligible = [counts for counts in every if problem.is_eligible(counts)]
    # If there is none, the empty deployment, which always fits.
    found = eligible or [(0,) * len(problem.options)]
    best = Bounds(problem, assigner).best_of(np.array(found, dtype=np.int64))
    assert best is not None  # There is at least one row.
    return best
