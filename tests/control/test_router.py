"""The router: soft pools, least expected work inside, overflow; and its view of load."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oserve.control.dispatch.ledger import WorkLedger
from oserve.control.dispatch.router import NoRoute, Route, Router, RouteReason, work_s
from oserve.control.dispatch.table import TableReplica
from oserve.core import Endpoint, ReplicaLoad, ReplicaPhase, Request

loads = st.lists(
    st.builds(
        ReplicaLoad,
        replica=st.sampled_from("abcd"),
        work_s=st.floats(0, 100),
        inflight=st.integers(0, 5),
        max_inflight=st.integers(1, 5),
        prefill_s_per_token=st.floats(1e-6, 1e-2),
        decode_s_per_token=st.floats(1e-6, 1e-2),
        max_model_len=st.sampled_from([0, 100, 1000]),
    ),
    unique_by=lambda load: load.replica,
).map(lambda items: {item.replica: item for item in items})
shares = st.dictionaries(st.sampled_from("abcd"), st.floats(0, 1))


def request_of(prompt_tokens: int = 50, output_tokens: int = 10) -> Request:
    return Request(
        id="x",
        arrival_s=0.0,
        workload_type="t",
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
    )


def load_of(name: str, work: float = 0.0, **fields: int) -> ReplicaLoad:
    return ReplicaLoad(
        replica=name,
        work_s=work,
        inflight=fields.get("inflight", 0),
        max_inflight=fields.get("max_inflight", 10),
        prefill_s_per_token=1e-3,
        decode_s_per_token=1e-2,
        max_model_len=fields.get("max_model_len", 0),
    )


def pick(pool: dict[str, float], *given_loads: ReplicaLoad, **fields: int) -> Route | NoRoute:
    router = Router({"t": pool}, overflow_s=2.0)
    return router.pick(request_of(**fields), {load.replica: load for load in given_loads})


@given(loads, shares, st.integers(1, 2000), st.sets(st.sampled_from("abcd")))
def test_picks_only_what_may_take_it_and_only_refuses_when_none_may(
    given_loads: dict[str, ReplicaLoad], share: dict[str, float], tokens: int, exclude: set[str]
) -> None:
    router = Router({"t": share})
    request = request_of(prompt_tokens=tokens)
    route = router.pick(request, given_loads, exclude=exclude)
    allowed = {name: load for name, load in given_loads.items() if name not in exclude}
    longest = max((load.max_model_len or 10**9 for load in allowed.values()), default=0)
    fits = {
        name: load
        for name, load in allowed.items()
        if (load.max_model_len or 10**9) >= min(tokens + 1, longest)
    }
    if isinstance(route, Route):
        load = fits[route.replica]
        assert load.inflight < load.max_inflight
        assert route.work_s == work_s(request, load)
        if route.reason is RouteReason.POOL:
            assert share[route.replica] > 0
    elif route is NoRoute.ALL_FULL:
        assert fits
        assert all(load.inflight >= load.max_inflight for load in fits.values())
    else:
        assert not allowed
    assert router.pick(request, given_loads, exclude=exclude) == route


@given(loads, shares)
def test_inside_the_pool_the_least_expected_work_wins(
    given_loads: dict[str, ReplicaLoad], share: dict[str, float]
) -> None:
    request = request_of()
    route = Router({"t": share}).pick(request, given_loads)
    if not isinstance(route, Route) or route.reason is not RouteReason.POOL:
        return
    free = [
        load.work_s + work_s(request, load)
        for name, load in given_loads.items()
        if share.get(name, 0) > 0
        and load.inflight < load.max_inflight
        and (load.max_model_len or 10**9) > request.prompt_tokens
    ]
    chosen = given_loads[route.replica]
    assert chosen.work_s + work_s(request, chosen) <= min(free) + 1e-4


def test_seconds_count_not_requests() -> None:
    few_long = load_of("a", work=9.0, inflight=1)
    many_short = load_of("b", work=1.0, inflight=9)
    route = pick({"a": 0.9, "b": 0.1}, few_long, many_short)
    assert isinstance(route, Route)
    assert route.replica == "b"


def test_overflows_only_past_the_threshold() -> None:
    def replica(work: float) -> str:
        route = pick({"a": 1.0}, load_of("a", work=work), load_of("b"))
        assert isinstance(route, Route)
        return route.replica

    assert replica(1.9) == "a"
    assert replica(2.1) == "b"


def test_a_pool_that_is_down_or_full_is_left() -> None:
    down = pick({"gone": 1.0}, load_of("b"))
    assert isinstance(down, Route)
    assert down.reason is RouteReason.POOL_UNAVAILABLE
    full = pick({"a": 1.0}, load_of("a", inflight=10), load_of("b"))
    assert isinstance(full, Route)
    assert full.reason is RouteReason.OVERFLOW


def test_too_long_for_all_goes_to_the_longest_context_to_be_refused_there() -> None:
    short, long = load_of("a", max_model_len=100), load_of("b", max_model_len=1000)
    route = pick({"a": 1.0}, short, long, prompt_tokens=5000)
    assert isinstance(route, Route)
    assert route.replica == "b"
    assert pick({"a": 1.0}) is NoRoute.NO_REPLICA


def replica_of(name: str) -> TableReplica:
    return TableReplica(
        id=name,
        shape="s",
        phase=ReplicaPhase.READY,
        endpoint=Endpoint(url="http://x"),
        max_inflight=8,
        max_model_len=0,
        accepts_priority=True,
        returns_token_ids=True,
        prefill_s_per_token=1e-3,
        decode_s_per_token=1e-2,
    )


@given(
    st.lists(
        st.tuples(st.integers(1, 1000), st.integers(1, 500), st.booleans(), st.booleans()),
        max_size=30,
    )
)
def test_the_ledger_is_even_when_everyone_has_left(
    requests: list[tuple[int, int, bool, bool]],
) -> None:
    ledger = WorkLedger()
    ledger.follow([replica_of("a")])
    now_s = 0.0
    entries = []
    for prompt, output, first, done in requests:
        now_s += 0.1
        entry = ledger.admit("a", request_of(prompt, output), now_s)
        entries.append((entry, first, done))
    load = ledger.loads(["a"])["a"]
    assert load.inflight == len(requests)
    for entry, first, done in entries:
        now_s += 0.1
        if first:
            entry.first_byte(now_s)
        entry.close(now_s, done=done)
        entry.close(now_s, done=done)
    assert ledger.own() == {"a": (0.0, 0)}


def test_the_ledger_learns_which_replica_is_slow() -> None:
    ledger = WorkLedger()
    ledger.follow([replica_of("fast"), replica_of("slow")])
    now_s = {"fast": 0.0, "slow": 0.0}
    for _ in range(50):
        for name, factor in (("fast", 0.5), ("slow", 3.0)):
            entries = [ledger.admit(name, request_of(), now_s[name]) for _ in range(4)]
            now_s[name] += factor * 4 * 0.15
            for entry in entries:
                entry.close(now_s[name], done=True)
    after = ledger.loads(["fast", "slow"])
    assert after["slow"].decode_s_per_token > 3 * after["fast"].decode_s_per_token


def test_a_corrected_price_leaves_what_is_booked() -> None:
    """Of the same engine; another one in its place begins with an empty book."""
    ledger = WorkLedger()
    cheap = replica_of("a")
    dear = replace(
        cheap,
        prefill_s_per_token=1.5 * cheap.prefill_s_per_token,
        decode_s_per_token=1.5 * cheap.decode_s_per_token,
    )
    ledger.follow([cheap])
    first = ledger.admit("a", request_of(), 0.0)
    before = ledger.loads(["a"])["a"]
    ledger.follow([dear])
    after = ledger.loads(["a"])["a"]
    # What was learned stays: the replica takes as long as before.
    assert after.inflight == 1
    assert after.prefill_s_per_token == pytest.approx(before.prefill_s_per_token)
    second = ledger.admit("a", request_of(), 0.1)
    first.close(0.2, done=True)
    assert ledger.loads(["a"])["a"].inflight == 1
    second.close(0.3, done=True)
    assert ledger.own() == {"a": (0.0, 0)}
    third = ledger.admit("a", request_of(), 0.4)
    ledger.follow([replace(dear, started_s=0.5)])
    assert ledger.own() == {"a": (0.0, 0)}
    third.close(0.6, done=True)
    assert ledger.own() == {"a": (0.0, 0)}


def test_work_of_other_processes_counts() -> None:
    ledger = WorkLedger()
    ledger.follow([replica_of("a")])
    ledger.set_elsewhere({"a": (5.0, 3)})
    load = ledger.loads(["a"])["a"]
    assert load.work_s == 5.0
    assert load.inflight == 3
