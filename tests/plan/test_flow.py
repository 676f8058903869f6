"""The paper's flow network against the linear programme, and preflow-push against scipy's."""

import random
from itertools import product

import numpy as np
import pytest
from scipy.optimize import linprog
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow

from oserve.plan.flow import GRAIN, served_by_flow
from oserve.plan.network import Arc, max_flow


@pytest.mark.parametrize("seed", range(60))
def test_preflow_push_finds_a_maximum_flow(seed: int) -> None:
    rng = random.Random(seed)
    size = rng.randint(2, 14)
    capacity = np.zeros((size, size), dtype=np.int32)
    for tail, head in product(range(size), repeat=2):
        if tail != head and rng.random() < 0.4:
            capacity[tail, head] = rng.randint(0, 30)
    arcs = [
        Arc(tail=tail, head=head, capacity=int(capacity[tail, head]))
        for tail, head in product(range(size), repeat=2)
        if capacity[tail, head]
    ]
    value, flows = max_flow(arcs, node_count=size, source=0, sink=size - 1)
    assert value == maximum_flow(csr_array(capacity), 0, size - 1).flow_value
    balance = [0] * size
    for arc, flow in zip(arcs, flows, strict=True):
        assert 0 <= flow <= arc.capacity
        balance[arc.tail] -= flow
        balance[arc.head] += flow
    assert balance[-1] == value
    assert not any(balance[1:-1])


def test_a_flow_needs_two_ends() -> None:
    with pytest.raises(ValueError, match="same node"):
        max_flow([], node_count=1, source=0, sink=0)


def most_served(capacity: list[list[float]], counts: list[int], rates: list[float]) -> float:
    types = len(rates)
    width = len(counts) * types
    rows, limits = [], []
    for j, rate in enumerate(rates):
        row = np.zeros(width)
        row[j::types] = 1.0
        rows.append(row)
        limits.append(rate)
    for i, count in enumerate(counts):
        row = np.zeros(width)
        for j, value in enumerate(capacity[i]):
            row[i * types + j] = 1 / value if value else 0.0
        rows.append(row)
        limits.append(float(count))
    bounds = [(0.0, None if value else 0.0) for row in capacity for value in row]
    found = linprog(-np.ones(width), A_ub=np.array(rows), b_ub=limits, bounds=bounds)
    return float(-found.fun)


@pytest.mark.parametrize("seed", range(60))
def test_the_flow_serves_what_the_linear_programme_serves(seed: int) -> None:
    rng = random.Random(seed)
    options, types = rng.randint(1, 8), rng.randint(1, 6)
    capacity = [
        [0.0 if rng.random() < 0.2 else rng.uniform(0.1, 10) for _ in range(types)]
        for _ in range(options)
    ]
    counts = [rng.randint(0, 3) for _ in range(options)]
    rates = [rng.choice([0.0, rng.uniform(0, 20), rng.uniform(0, 10)]) for _ in range(types)]
    flow = served_by_flow(capacity_rps=capacity, counts=counts, rates_rps=rates)
    wanted = most_served(capacity, counts, rates)
    assert flow.served_rps == pytest.approx(wanted, rel=1e-6, abs=1e-6)
    for i, row in enumerate(flow.rates_rps):
        busy = sum(rate / value for rate, value in zip(row, capacity[i], strict=True) if value)
        assert busy <= counts[i] * (1 + 1e-6)
        assert flow.used_units[i] == pytest.approx(busy * flow.units[i], rel=1e-6, abs=1e-6)
    for j, rate in enumerate(rates):
        assert sum(row[j] for row in flow.rates_rps) <= rate + 1e-8


def test_one_plain_flow_is_not_enough_where_shapes_suit_different_types() -> None:
    """The second phase takes a type back from the replica that another type needs more."""
    flow = served_by_flow(
        capacity_rps=[[10.0, 4.0], [8.0, 0.0]], counts=[1, 1], rates_rps=[9.0, 4.0]
    )
    assert flow.served_rps == pytest.approx(most_served([[10, 4], [8, 0]], [1, 1], [9, 4]))
    assert flow.phases > 1


def test_units_are_the_least_common_multiple_of_the_capacities() -> None:
    flow = served_by_flow(capacity_rps=[[4.0, 6.0]], counts=[1], rates_rps=[2.0, 3.0])
    assert flow.units == (12 * GRAIN,)
    assert flow.used_units[0] == pytest.approx(12 * GRAIN)
    assert flow.served_rps == pytest.approx(5.0)
