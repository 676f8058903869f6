"""A replica that fails at once draws little traffic, and comes back."""

from hypothesis import given
from hypothesis import strategies as st

from oserve.control.dispatch.breaker import (
    BreakerPolicy,
    Breakers,
    concerns_oserve,
    refuses,
    retry_after_s,
    retryable_elsewhere,
)
from oserve.control.dispatch.ledger import WorkLedger
from oserve.control.dispatch.router import Route, Router
from oserve.control.dispatch.table import TableReplica
from oserve.core import Endpoint, ReplicaPhase, Request

POLICY = BreakerPolicy()


def replica(name: str) -> TableReplica:
    return TableReplica(
        id=name,
        shape="x",
        phase=ReplicaPhase.READY,
        endpoint=Endpoint(url="x"),
        max_inflight=8,
        max_model_len=0,
        accepts_priority=False,
        returns_token_ids=False,
        prefill_s_per_token=1e-4,
        decode_s_per_token=1e-2,
    )


def test_of_two_the_one_that_fails_at_once_gets_few() -> None:
    """Thirty requests a second for twenty seconds, as the gateway routes them; time is made up."""
    table = [replica("bad"), replica("good")]
    router = Router({"all": {"bad": 0.5, "good": 0.5}})
    ledger = WorkLedger()
    ledger.follow(table)
    breakers = Breakers()
    failed = served = 0
    running: list[tuple[float, object]] = []
    for number in range(600):
        now_s = number / 30.0
        request = Request(
            id=str(number), arrival_s=now_s, workload_type="all", prompt_tokens=10, output_tokens=2
        )
        running = [item for item in running if item[0] > now_s or item[1].close(now_s, done=True)]  # type: ignore[attr-defined]
        tried: set[str] = set()
        while True:
            route = router.pick(
                request, ledger.loads(["bad", "good"]), exclude=tried | breakers.open(now_s)
            )
            assert isinstance(route, Route)
            breakers.sent(route.replica, now_s)
            entry = ledger.admit(route.replica, request, now_s)
            if route.replica == "good":
                breakers.served("good")
                running.append((now_s + 0.1, entry))
                served += 1
                break
            entry.close(now_s, done=False)
            breakers.failed("bad", now_s, "401", at_once=True)
            tried.add("bad")
            failed += 1
    assert served == 600
    # One at once, then after 1, 2, 4, ... seconds.
    assert failed == 5


def test_life_of_a_breaker() -> None:
    breakers = Breakers()
    for _ in range(POLICY.failures - 1):
        breakers.failed("a", 0.0, "500")
        assert breakers.open(0.0) == set()
    breakers.failed("a", 0.0, "500")
    assert breakers.open(0.9) == {"a"}
    assert breakers.report(0.25) == {"a": ("500", 0.75)}
    # Its time has come: one request is the trial, and no other goes there meanwhile.
    assert breakers.open(1.0) == set()
    breakers.sent("a", 1.0)
    assert breakers.open(1.1) == {"a"}
    breakers.failed("a", 1.2, "503")
    assert breakers.open(3.1) == {"a"}
    assert breakers.open(3.2) == set()
    # A trial that ends without outcome, or never, makes room for another.
    breakers.sent("a", 3.2)
    assert breakers.open(3.3) == {"a"}
    breakers.release("a")
    assert breakers.open(3.3) == set()
    breakers.sent("a", 4.0)
    assert breakers.open(4.0 + POLICY.trial_s) == set()
    breakers.served("a")
    assert breakers.report(4.0) == {}
    breakers.failed("a", 5.0, "500")
    assert breakers.open(5.0) == set()
    breakers.follow(["b"])
    assert breakers.report(5.0) == {}


def test_retry_after_is_honoured_within_bounds() -> None:
    for asked, least in ((20.0, 20.0), (0.5, 1.0), (1e9, POLICY.max_retry_after_s)):
        breakers = Breakers()
        breakers.failed("a", 0.0, "429", at_once=True, retry_after_s=asked)
        assert breakers.open(least - 0.01) == {"a"}
        assert breakers.open(least) == set()
    assert retry_after_s(b" 17 ") == 17.0
    for value in (b"", b"Wed, 21 Oct 2026 07:28:00 GMT", b"-3", b"1e9", b"9" * 40, b"\xff"):
        assert retry_after_s(value) == 0.0


OUTCOMES = st.tuples(
    st.sampled_from(["failed", "at_once", "asked", "sent", "served"]), st.floats(0, 90)
)


@given(st.lists(OUTCOMES, max_size=30))
def test_it_always_comes_back(course: list[tuple[str, float]]) -> None:
    breakers = Breakers()
    now_s = 0.0
    for what, passed_s in course:
        now_s += passed_s
        match what:
            case "sent":
                breakers.sent("a", now_s)
            case "served":
                breakers.served("a")
                assert breakers.open(now_s) == set()
            case _:
                asked_s = 40.0 if what == "asked" else 0.0
                breakers.failed("a", now_s, "x", at_once=what != "failed", retry_after_s=asked_s)
        assert breakers.open(now_s) <= {"a"}
        bound_s = max(POLICY.most_s, POLICY.trial_s, 40.0)
        assert breakers.open(now_s + bound_s) == set()


def test_what_another_replica_may_answer() -> None:
    for status in (500, 502, 503, 408, 424, 429):
        assert retryable_elsewhere(status, attached=False)
    for status in (401, 403, 404, 405):
        assert retryable_elsewhere(status, attached=True)
        assert not retryable_elsewhere(status, attached=False)
        assert refuses(status)
        assert concerns_oserve(status)
    for status in (200, 400, 413, 422):
        assert not retryable_elsewhere(status, attached=True)
        assert not refuses(status)
    assert refuses(429)
    assert not concerns_oserve(429)
