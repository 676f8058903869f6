"""How much prompt work a replica may be given at once, so that the rest waits in the gateway."""

from hypothesis import given
from hypothesis import strategies as st

from oserve.control.dispatch.ledger import WorkLedger
from oserve.control.dispatch.overload import FirstTokens, OverloadPolicy, max_prompt_s, too_late
from oserve.control.dispatch.table import TableReplica
from oserve.core import Endpoint, ReplicaPhase, Request

REPLICA = TableReplica(
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
    step_tokens=50,
)


def request_of(prompt_tokens: int) -> Request:
    return Request(
        id="x",
        arrival_s=0.0,
        workload_type="t",
        prompt_tokens=prompt_tokens,
        output_tokens=10,
    )


def ledger_of(ttft_s: float | None, processes: int = 1) -> WorkLedger:
    ledger = WorkLedger(OverloadPolicy(ttft_s=ttft_s), processes=processes)
    ledger.follow([REPLICA])
    return ledger


def is_full(ledger: WorkLedger) -> bool:
    load = ledger.loads(["a"])["a"]
    return load.inflight >= load.max_inflight


def test_a_replica_that_owes_enough_prompts_is_full_until_one_is_done() -> None:
    ledger = ledger_of(2.0)
    entry = ledger.admit("a", request_of(200), 0.0)
    assert not is_full(ledger)
    ledger.admit("a", request_of(100), 0.0)
    # An eighth of 2 s is owed now.
    assert is_full(ledger)
    entry.first_byte(0.01)
    assert not is_full(ledger)
    entry.close(0.02, done=True)
    assert not is_full(ledger)


def test_a_prompt_that_nobody_sees_the_end_of_does_not_count() -> None:
    ledger = ledger_of(2.0)
    for _ in range(4):
        ledger.admit("a", request_of(1000), 0.0, streams=False)
    assert not is_full(ledger)


def test_without_a_limit_only_the_number_of_requests_counts() -> None:
    ledger = ledger_of(None)
    for _ in range(7):
        ledger.admit("a", request_of(10**6), 0.0)
    assert not is_full(ledger)
    ledger.admit("a", request_of(1), 0.0)
    assert is_full(ledger)


def test_gateway_processes_share_the_bound() -> None:
    ledger = ledger_of(2.0, processes=5)
    assert not is_full(ledger)
    ledger.admit("a", request_of(50), 0.0)
    assert is_full(ledger)


@given(st.lists(st.tuples(st.integers(1, 5000), st.sampled_from(["first", "close", "keep"]))))
def test_what_is_owed_is_what_has_no_first_token_yet(
    asked: list[tuple[int, str]],
) -> None:
    ledger = ledger_of(1.0)
    owed = 0
    for number, (prompt, course) in enumerate(asked):
        entry = ledger.admit("a", request_of(prompt), 0.0)
        if course == "keep":
            owed += prompt
        else:
            if course == "first":
                entry.first_byte(0.0)
            entry.close(0.0, done=False)
            entry.close(0.0, done=False)
        kept = sum(1 for _, how in asked[: number + 1] if how == "keep")
        most = max_prompt_s(OverloadPolicy(ttft_s=1.0), step_tokens=50, prefill_s_per_token=1e-3)
        if abs(owed * 1e-3 - most) > 1e-6:
            assert is_full(ledger) == (owed * 1e-3 > most or kept >= 8)


def test_the_bound_keeps_an_engine_s_steps_full() -> None:
    policy = OverloadPolicy(ttft_s=0.1)
    assert max_prompt_s(policy, step_tokens=512, prefill_s_per_token=1e-3) == 0.512
    assert max_prompt_s(policy, step_tokens=0, prefill_s_per_token=1e-3) == 0.1 / 8


def test_late_is_who_leaves_the_engine_too_little_time() -> None:
    policy = OverloadPolicy(ttft_s=2.0)
    assert not too_late(policy, arrival_s=10.0, now_s=11.0, prefill_s=0.4)
    assert too_late(policy, arrival_s=10.0, now_s=11.0, prefill_s=0.6)
    assert too_late(policy, arrival_s=10.0, now_s=11.0, prefill_s=0.4, first_token_s=1.1)


@given(took_s=st.floats(0.01, 4.0), slow_s=st.floats(0.0, 1.0))
def test_what_engines_take_until_first_tokens_is_learned(took_s: float, slow_s: float) -> None:
    policy = OverloadPolicy(ttft_s=2.0)
    seen = FirstTokens(policy)
    for number in range(600):
        # One in twenty is slower, which is rarer than what is looked at.
        seen.observe(took_s + (slow_s if number % 20 == 0 else 0.0))
    assert min(took_s, 1.5) - 0.1 <= seen.seconds <= min(took_s + 0.1, 1.5)
    for _ in range(600):
        seen.observe(0.0)
    assert seen.seconds == 0.0
