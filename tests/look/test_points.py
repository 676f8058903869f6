"""Points of the charts, made of request records."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oserve.core import FinishStatus, RequestRecord
from oserve.look.points import (
    MOST_POINTS,
    MOST_TENANTS,
    OTHERS,
    PageLimits,
    PagePoint,
    PointHistory,
    RecordWindow,
)


def record(end_s: float, **fields: Any) -> RequestRecord:
    defaults: dict[str, Any] = {
        "arrival_s": end_s - 2.0,
        "prompt_tokens": 100,
        "output_tokens": 50,
        "workload_type": "chat",
        "replica": "r0",
        "ttft_s": 0.5,
        "tpot_s": 0.03,
        "e2e_s": 2.0,
        "status": FinishStatus.COMPLETED,
    }
    return RequestRecord(**{**defaults, **fields})


def window(*records: RequestRecord, **limits: float) -> RecordWindow:
    made = RecordWindow(PageLimits(**limits))
    made.add(records)
    return made


def test_percentiles_are_of_the_last_minute() -> None:
    found = window(*(record(100.0 + i, ttft_s=i / 100) for i in range(1, 101)))
    point = found.types(200.0, {})["chat"]
    # Those that ended at 141 to 200 s.
    assert point.ended == 60
    assert (point.ttft_p50_s, point.ttft_p99_s) == (0.7, 1.0)
    assert point.rps == 1.0


def test_requests_are_judged_by_their_tier_or_by_the_limits() -> None:
    found = window(
        record(10.0, ttft_s=0.9),
        record(10.0, ttft_s=1.1),
        record(10.0, ttft_s=1.1, kept=True, tier="bulk"),
        record(10.0, kept=False, tier="tight"),
        record(10.0, status=FinishStatus.FAILED),
        record(10.0, status=FinishStatus.DISCONNECTED),
        ttft_s=1.0,
    )
    point = found.types(10.0, {})["chat"]
    assert (point.ended, point.kept) == (5, 2)
    recent = found.recent(10.0)
    assert recent.by_tier == {"": (3, 1), "bulk": (1, 1), "tight": (1, 0)}
    assert (recent.requests, recent.failed) == (5, 1)


def test_flow_and_tenants() -> None:
    records = [record(10.0, replica="r1")] * 3 + [record(10.0, workload_type="code")]
    records += [record(10.0, tenant=f"t{i:02}", output_tokens=1000 * i) for i in range(12)]
    recent = window(*records).recent(10.0)
    assert (recent.types, recent.replicas) == (["chat", "code"], ["r0", "r1"])
    assert recent.flow == [(0, 0, 12), (0, 1, 3), (1, 0, 1)]
    assert len(recent.tenants) == MOST_TENANTS
    assert recent.tenants[0].name == "t11"
    assert recent.tenants[-1].name == OTHERS
    assert sum(item.requests for item in recent.tenants) == 12


def test_the_forecast_is_told_with_the_arrivals() -> None:
    types = window().types(10.0, {"chat": (2.0, 2.5, 1.5, 3.5), "code": (-1.0, -1.0, -1.0, -1.0)})
    chat, code = types["chat"], types["code"]
    assert (chat.rps, chat.expected_rps, chat.low_rps, chat.high_rps) == (2.0, 2.5, 1.5, 3.5)
    assert (code.rps, code.expected_rps) == (0.0, None)
    assert chat.ttft_p50_s is None


@given(st.lists(st.floats(0.0, 10_000.0), max_size=600))
def test_the_history_is_an_hour_in_order(times: list[float]) -> None:
    history = PointHistory()
    for at_s in times:
        history.add(PagePoint(at_s=at_s, types={}))
    found = [item.at_s for item in history.points]
    assert found == sorted(set(found))
    assert len(found) <= MOST_POINTS
    if times:
        assert found[-1] == times[-1]
        assert found[-1] - found[0] < 3600.0


def test_points_are_saved_and_read_again() -> None:
    point = PagePoint(at_s=1.0, types=window(record(1.0)).types(1.0, {}), queued=3)
    assert msgspec.json.decode(msgspec.json.encode(point), type=PagePoint) == point


@pytest.mark.parametrize(("ttft_s", "kept"), [(None, True), (0.4, False)])
def test_a_limit_that_is_not_set_holds(ttft_s: float | None, kept: bool) -> None:
    assert PageLimits(ttft_s=ttft_s).keeps(record(1.0)) is kept
