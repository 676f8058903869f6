"""Caches pull a request where it was, as far as load allows; the late are served last."""

from hypothesis import given
from hypothesis import strategies as st

from oserve.control.dispatch.affinity import Affinity
from oserve.control.dispatch.ledger import WorkLedger
from oserve.control.dispatch.overload import OverloadPolicy, shed_at_s, too_late
from oserve.control.dispatch.router import Route, Router
from oserve.control.dispatch.table import TableReplica
from oserve.core import Endpoint, ReplicaLoad, ReplicaPhase, Request

from .test_router import load_of, request_of


def pick(loads: list[ReplicaLoad], cached: dict[str, int], shares: dict[str, float]) -> str:
    router = Router({"t": shares})
    request = request_of(prompt_tokens=1000)
    route = router.pick(request, {load.replica: load for load in loads}, cached=cached)
    assert isinstance(route, Route)
    return route.replica


def test_a_session_stays_until_waiting_there_costs_more_than_its_cache_saves() -> None:
    both = {"a": 0.5, "b": 0.5}
    # A prompt of 1,000 tokens takes 1 s; 900 of them are cached on b.
    cached = {"b": 900}
    assert pick([load_of("a"), load_of("b", 0.5)], cached, both) == "b"
    assert pick([load_of("a"), load_of("b", 1.5)], cached, both) == "a"
    # A cache outside the pool does not draw requests out of it.
    assert pick([load_of("a", 0.1), load_of("b")], cached, {"a": 1.0}) == "a"


def test_what_was_sent_is_remembered_and_what_is_gone_forgotten() -> None:
    affinity = Affinity(most=2)
    affinity.sent("s", "p", "a", prompt_tokens=100, prefix_tokens=40)
    assert affinity.cached("s", "p", 300) == {"a": 100}
    assert affinity.cached("", "p", 300) == {"a": 40}
    assert affinity.cached("s", "", 50) == {"a": 49}
    assert affinity.cached("other", "", 50) == {}
    affinity.forget(["a"])
    assert affinity.cached("s", "p", 300) == {}


@given(st.lists(st.tuples(st.sampled_from("pqrstuv"), st.sampled_from("abcdefgh")), max_size=60))
def test_memory_is_bounded(sent: list[tuple[str, str]]) -> None:
    affinity = Affinity(most=3)
    for session, replica in sent:
        affinity.sent(session, "", replica, prompt_tokens=10, prefix_tokens=0)
        assert replica in affinity.cached(session, "", 100)
    known = [name for name in "pqrstuv" if affinity.cached(name, "", 100)]
    assert len(known) <= 3
    assert all(len(affinity.cached(name, "", 100)) <= 4 for name in known)


def test_shares_are_mixed_by_the_chances_of_types() -> None:
    router = Router({}, type_shares=[{"a": 1.0}, {"b": 1.0}, {"c": 1.0}])

    def shares(*probabilities: float) -> dict[str, float]:
        request = Request(
            id="x",
            arrival_s=0.0,
            workload_type="t",
            prompt_tokens=10,
            output_tokens=10,
            probabilities=probabilities,
        )
        return dict(router.shares(request))

    assert shares(0.6, 0.4, 0.0) == {"a": 0.6, "b": 0.4}
    # What is hardly likely does not make a pool.
    assert shares(0.97, 0.02, 0.01) == {"a": 0.97}


def test_an_outgrown_answer_weighs_on_its_replica() -> None:
    ledger = WorkLedger()

    ledger.follow(
        [
            TableReplica(
                id="a",
                shape="s",
                phase=ReplicaPhase.READY,
                endpoint=Endpoint(url="x"),
                max_inflight=8,
                max_model_len=0,
                accepts_priority=False,
                returns_token_ids=False,
                prefill_s_per_token=1e-3,
                decode_s_per_token=1e-2,
            )
        ]
    )
    entry = ledger.admit("a", request_of(prompt_tokens=100, output_tokens=10), 0.0)
    before = ledger.loads(["a"])["a"].work_s
    entry.outgrown(50.0, 0.1)
    assert abs(ledger.loads(["a"])["a"].work_s - before - 0.5) < 1e-9
    entry.close(0.2, done=True)
    assert ledger.loads(["a"])["a"].work_s == 0.0


def test_too_late_is_when_even_the_quickest_would_miss_it() -> None:
    policy = OverloadPolicy(ttft_s=2.0, shed_after_s=5.0)
    assert not too_late(policy, arrival_s=10.0, now_s=11.0, prefill_s=0.4)
    assert too_late(policy, arrival_s=10.0, now_s=11.0, prefill_s=0.6)
    assert not too_late(OverloadPolicy(), arrival_s=0.0, now_s=1e9, prefill_s=1.0)
    assert shed_at_s(policy, arrival_s=10.0) == 15.0
    assert shed_at_s(OverloadPolicy(), arrival_s=0.0) is None
