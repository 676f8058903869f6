"""The peak of a trace, and the steady traffic made of the requests around it."""

from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oserve.evaluate.peak import PeakTraffic, find_peak, peak_traffic
from oserve.evaluate.simulator import SimulatedTraffic
from oserve.plan.demand import Demand, demand_from_trace
from oserve.traces import TraceRequest


def made(arrivals: list[float], rate_scale: float) -> tuple[Demand, SimulatedTraffic]:
    """Short and long requests in turn, at these seconds."""
    prompts = [50 if index % 2 else 2000 for index in range(len(arrivals))]
    demand = demand_from_trace(
        [
            TraceRequest(arrival_s=at, prompt_tokens=prompt, output_tokens=20)
            for at, prompt in zip(arrivals, prompts, strict=True)
        ],
        source="test",
        max_model_len=4096,
        k=2,
        rate_scale=rate_scale,
    )
    traffic = SimulatedTraffic(
        arrival_s=np.array(arrivals),
        prompt_tokens=np.array(prompts),
        output_tokens=np.full(len(arrivals), 20),
    )
    return demand, traffic


@settings(max_examples=50, deadline=None)
@given(gaps=st.lists(st.floats(0.0, 30.0), min_size=1, max_size=200))
def test_no_window_is_busier_than_the_peak(gaps: list[float]) -> None:
    arrival_s = np.array(list(accumulate(gaps)))
    peak = find_peak(arrival_s)
    counts = [
        int(np.sum((arrival_s >= at) & (arrival_s <= at + peak.window_s))) for at in arrival_s
    ]
    assert peak.rate_rps * peak.window_s == pytest.approx(max(counts))
    assert peak.window_s >= 1.0
    assert arrival_s[0] <= peak.start_s <= arrival_s[-1]


def test_the_peak_is_counted_over_a_minute_or_a_hundred_requests() -> None:
    slow = np.arange(500, dtype=np.float64) * 3.0
    assert find_peak(slow).window_s == pytest.approx(300.0, rel=0.01)
    fast = np.array([0.5 * i for i in range(1000)] + [500.0 + 0.1 * i for i in range(600)])
    peak = find_peak(fast)
    assert peak.window_s == 60.0
    assert peak.rate_rps == pytest.approx(10.0, rel=0.02)
    assert peak.start_s == pytest.approx(499.5)


def steady(arrivals: list[float], rate_scale: float = 1.0) -> PeakTraffic:
    demand, traffic = made(arrivals, rate_scale)
    return peak_traffic(demand, traffic, rate_scale=rate_scale)


def test_every_window_of_the_traffic_has_the_rate_of_the_peak() -> None:
    calm = [0.5 * index for index in range(2000)]
    busy = [1000.0 + 0.1 * index for index in range(600)]
    after = [1060.0 + 0.5 * index for index in range(2000)]
    found = steady([*calm, *busy, *after], rate_scale=2.0)
    requests = found.traffic.requests
    assert len(requests) == 3000
    assert sum(found.traffic.rates) == pytest.approx(20.0, rel=0.02)
    counts, _ = np.histogram(requests.arrival_s, bins=np.arange(0.0, requests.duration_s, 10.0))
    assert counts.min() == pytest.approx(200, rel=0.1)
    assert counts.max() == pytest.approx(200, rel=0.1)
    assert "busiest 30 s" in found.peak
    assert found.mean_load == pytest.approx(4600 / 2060 / 10, rel=0.02)
    assert (np.diff(requests.arrival_s) >= 0).all()
    assert set(found.traffic.kinds.tolist()) == {0, 1}


@pytest.mark.parametrize("count", [1, 40])
def test_few_requests_are_drawn_from(count: int) -> None:
    found = steady([0.5 * index for index in range(count)])
    assert found.words == "Poisson arrivals"
    assert len(found.traffic.requests) >= 1000
    assert found.traffic.requests.rate_rps == pytest.approx(sum(found.traffic.rates), rel=0.1)
