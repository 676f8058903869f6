"""Reports of gateway processes are summed as they come, and leave nothing when they go."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from oserve.control.dispatch.events import LoadElsewhere
from oserve.control.dispatch.machine import RequestMachine
from oserve.control.dispatch.policy import DispatchPolicy
from oserve.control.tally import Batch
from oserve.core import FinishStatus, RequestRecord
from oserve.gateway.access.limits import TenantLoad
from oserve.gateway.process.messages import WorkerReport
from oserve.gateway.process.outbox import RecordInbox, RecordOutbox
from oserve.gateway.process.reports import STALE_S, ReportBook
from oserve.gateway.process.states import GatewayState, gateway_gauges, status_of

NODES = ("", "a", "b")
UNIX_S = 1.7e9


def report(incarnation: int, **given: Any) -> WorkerReport:
    fields: dict[str, Any] = {
        "counts": Batch(number=1, until_s=UNIX_S),
        "outstanding": {},
        "metrics": {},
        "queued": 0,
        "table": 0,
        "sent_s": UNIX_S,
    }
    return WorkerReport(incarnation=incarnation, **fields | given)


loads = st.dictionaries(
    st.sampled_from(["r", "s", "t"]),
    st.tuples(st.floats(0.0, 1e4), st.integers(0, 50)),
)
moves = st.lists(
    st.one_of(
        st.tuples(st.just("report"), st.integers(1, 6), loads, st.integers(0, 9)),
        st.tuples(st.just("forget"), st.integers(1, 6)),
        st.tuples(st.just("pass"), st.floats(0.0, 4.0)),
    ),
    max_size=40,
)


@given(moves)
def test_sums_are_those_of_the_reports_that_count(script: list[tuple[Any, ...]]) -> None:
    book, now_s = ReportBook(), 0.0
    latest: dict[int, tuple[WorkerReport, float]] = {}
    gone: set[int] = set()
    for step in script:
        match step:
            case ("report", incarnation, load, queued):
                told = report(
                    incarnation, outstanding=load, queued=queued, metrics={"m": {"": [1.0]}}
                )
                book.take(told, NODES[incarnation % 3], now_s, UNIX_S)
                if incarnation not in gone:
                    latest[incarnation] = told, now_s
            case ("forget", incarnation):
                book.forget(incarnation)
                gone.add(incarnation)
                latest.pop(incarnation, None)
            case ("pass", seconds):
                now_s += seconds
        book.expire(now_s)
        counted = {
            key: told
            for key, (told, at_s) in latest.items()
            if key % 3 == 0 or now_s - at_s <= STALE_S
        }
        assert book.processes == len(counted)
        for one in (*latest, 99):
            others = [told for key, told in counted.items() if key != one]
            elsewhere, queued = book.elsewhere(one)
            assert queued == sum(told.queued for told in others)
            for name in ("r", "s", "t"):
                owed_s, count = elsewhere.get(name, (0.0, 0))
                wanted = [told.outstanding.get(name, (0.0, 0)) for told in others]
                assert count == sum(item[1] for item in wanted)
                assert owed_s == pytest.approx(sum(item[0] for item in wanted), abs=1e-6)
    for one in list(latest):
        book.forget(one)
    assert book.elsewhere(99) == ({}, 0)
    assert book.counted_until_s == math.inf


def test_metrics_between_two_reports_that_have_them_are_the_last_ones() -> None:
    book = ReportBook()
    for number in (1.0, 2.0):
        book.take(report(1, metrics={"m": {"": [number]}}), "a", 0.0, UNIX_S)
        book.take(report(1, metrics=None), "a", 0.0, UNIX_S)
    book.take(report(2, metrics=None), "a", 0.0, UNIX_S)
    assert book.metrics() == {"m": {"": [2.0]}}
    book.forget(1)
    # It ends slowly, and reports again.
    book.take(report(1, metrics={"m": {"": [3.0]}}), "a", 0.0, UNIX_S)
    assert book.metrics() == {"m": {"": [2.0]}}


def test_a_process_that_is_cut_off_holds_nothing_up() -> None:
    book = ReportBook()
    breakers = {"r": ("it answers with 500", 4.0)}
    book.take(report(1, open_breakers=breakers), "a", 0.0, UNIX_S)
    book.take(report(2, counts=Batch(until_s=UNIX_S + 9)), "b", STALE_S, UNIX_S)
    assert book.open_breakers == breakers
    assert book.counted_until_s == UNIX_S
    book.expire(STALE_S + 0.1)
    assert book.open_breakers == {}
    assert book.counted_until_s == UNIX_S + 9
    view = book.view(1, STALE_S + 0.1)
    assert view is not None
    told = status_of("a", 0, GatewayState.SERVING, view)
    assert (told.state, told.reason) == (GatewayState.AWAY, "it does not report")
    assert gateway_gauges([told]) == [
        ("oserve_gateways", ["a", "away"], 1.0),
        ("oserve_gateway_requests", ["a"], 0.0),
    ]
    # It is heard again.
    book.take(report(1), "a", STALE_S + 1.0, UNIX_S)
    assert book.processes == 2


@given(
    behind_s=st.floats(-1e5, 1e5).filter(lambda s: abs(abs(s) - 1.0) > 0.6),
    delays_s=st.lists(st.floats(0.0, 5.0), max_size=20),
)
def test_clocks_of_other_nodes_are_known_in_spite_of_delays(
    behind_s: float, delays_s: list[float]
) -> None:
    book = ReportBook()
    found = 0
    for delay_s in (0.0, *delays_s):
        sent_s = UNIX_S - behind_s
        found = book.take(report(1, sent_s=sent_s), "a", 0.0, UNIX_S + delay_s)
    if abs(behind_s) >= 1.6:
        assert abs(found - behind_s) <= 0.5 + 1.0  # of delays, a twentieth at most
    elif abs(behind_s) < 0.4:
        assert found == 0 or delays_s
    # Beside the server there is one clock.
    assert book.take(report(2, sent_s=0.0), "", 0.0, UNIX_S) == 0


def test_shifted_counts_are_the_same_counts() -> None:
    batch = Batch(number=3, until_s=9.5, names=("x",), arrivals={7: [1.0]}, tokens={8: [1, 2, 3]})
    moved = batch.shifted(-5)
    assert (moved.until_s, moved.arrivals, moved.tokens) == (4.5, {2: [1.0]}, {3: [1, 2, 3]})
    assert moved.shifted(5) == batch
    assert batch.shifted(0) is batch


def record(number: int) -> RequestRecord:
    return RequestRecord(
        arrival_s=float(number),
        prompt_tokens=number,
        output_tokens=1,
        workload_type="all",
        replica="r",
        ttft_s=None,
        tpot_s=None,
        e2e_s=1.0,
        status=FinishStatus.COMPLETED,
    )


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans(), st.booleans()), max_size=30))
def test_each_record_arrives_once_whatever_is_lost(steps: list[tuple[int, bool, bool]]) -> None:
    outbox, inbox, arrived, made = RecordOutbox(), RecordInbox(), [], 0
    for count, asked, answered in (*steps, (0, True, True)):
        for _ in range(count):
            assert outbox.put(record(made))
            made += 1
        if asked:
            first, records = outbox.next()
            arrived += inbox.fresh(1, first, records)
            if answered:
                outbox.acknowledge(inbox.taken(1))
    assert arrived == [record(number) for number in range(made)]
    assert outbox.empty


def test_the_hub_of_the_next_server_goes_on_with_the_records() -> None:
    outbox, first, second = RecordOutbox(), RecordInbox(), RecordInbox()
    for number in range(4):
        outbox.put(record(number))
        if number == 1:
            assert len(first.fresh(1, *outbox.next())) == 2
            outbox.acknowledge(first.taken(1))
    assert second.fresh(1, *outbox.next()) == [record(2), record(3)]
    outbox.acknowledge(second.taken(1))
    assert outbox.empty
    second.forget(1)
    assert second.taken(1) == 0


def test_an_outbox_has_an_end() -> None:
    outbox, one = RecordOutbox(), record(1)
    while outbox.put(one):
        pass
    first, records = outbox.next()
    assert first == 0
    assert len(records) == 1000
    outbox.acknowledge(1000)
    assert outbox.put(replace(one, prompt_tokens=2))
    assert outbox.next()[0] == 1000


def test_limits_are_divided_by_the_processes_that_report() -> None:
    machine = RequestMachine(DispatchPolicy(max_queued=9))
    for processes, most in ((0, 9), (4, 3), (0, 3), (1, 9)):
        machine.handle(LoadElsewhere({}, processes), 0.0)
        assert machine.waiting._max_queued == most


uses = st.dictionaries(
    st.sampled_from(["acme", "other"]), st.tuples(st.integers(0, 9), st.integers(0, 9))
)
tenant_steps = st.lists(
    st.one_of(
        st.tuples(st.just("report"), st.integers(1, 6), uses),
        st.tuples(st.just("forget"), st.integers(1, 6)),
        st.tuples(st.just("pass"), st.floats(0.0, 4.0)),
    ),
    max_size=30,
)


@given(tenant_steps)
def test_what_tenants_have_in_flight_goes_with_its_process(script: list[tuple[Any, ...]]) -> None:
    book, now_s = ReportBook(), 0.0
    latest: dict[int, tuple[dict[str, TenantLoad], float]] = {}
    gone: set[int] = set()
    for step in script:
        match step:
            case ("report", incarnation, used):
                tenants = {name: TenantLoad(*load) for name, load in used.items()}
                told = report(incarnation, tenants=tenants)
                book.take(told, NODES[incarnation % 3], now_s, UNIX_S)
                if incarnation not in gone:
                    latest[incarnation] = tenants, now_s
            case ("forget", incarnation):
                book.forget(incarnation)
                gone.add(incarnation)
            case ("pass", seconds):
                now_s += seconds
        book.expire(now_s)
        counted = [
            key
            for key, (_, at_s) in latest.items()
            if key not in gone and (key % 3 == 0 or now_s - at_s <= STALE_S)
        ]
        assert sorted(book.position(key) for key in counted) == list(range(len(counted)))
        for one in (*latest.keys() - gone, 99):
            found = book.tenants_elsewhere(one)
            others = [latest[key][0] for key in counted if key != one]
            for name in ("acme", "other"):
                loads = [tenants[name] for tenants in others if name in tenants]
                assert found.get(name, TenantLoad()) == TenantLoad(
                    sum(load.inflight for load in loads), sum(load.queued for load in loads)
                )
