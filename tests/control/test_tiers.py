"""Tiers in the request machine: precisions are never broken, limits decide whose turn it is."""

import math
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from oserve.control.dispatch import commands as do
from oserve.control.dispatch import events as on
from oserve.control.dispatch.order import OrderPolicy
from oserve.control.dispatch.policy import DispatchPolicy
from oserve.control.dispatch.state import RequestState
from oserve.control.dispatch.tiers import first_token_in_s, shift_s
from oserve.control.status import tier_rows
from oserve.core import OverloadAction, Precision, Promise, ReplicaLoad, Request, Tier

from .dispatch_driver import Driver
from .dispatch_scenario import Ask, Fake, Scenario, arrival, replica_of, table_of
from .dispatch_world import World
from .test_machine import ASKS, CHANGES, FAKES, POLICIES

LIMITS = st.sampled_from([None, 0.4, 2.0, 30.0])
TIERS = st.builds(
    Tier,
    name=st.sampled_from(["a", "b", "c"]),
    ttft_s=LIMITS,
    tpot_s=st.sampled_from([None, 0.1]),
    e2e_s=LIMITS,
    precisions=st.sampled_from([(), (Precision.BF16,), (Precision.INT8, Precision.FP8)]),
    weight=st.sampled_from([0.5, 1.0, 4.0]),
    overload=st.sampled_from(OverloadAction),
)


@given(
    st.data(),
    st.lists(TIERS, min_size=1, max_size=3, unique_by=lambda tier: tier.name),
    st.lists(ASKS, min_size=1, max_size=12),
)
def test_no_request_ever_lands_on_a_precision_that_its_tier_excludes(
    data: st.DataObject, tiers: list[Tier], asks: list[Ask]
) -> None:
    """By no overflow, retry, breaker, vacated replica or moved stream; the world checks it."""
    tiered = [replace(ask, tier=data.draw(st.sampled_from(tiers))) for ask in asks]
    precisions = st.sampled_from(["bf16", "int8", ""])
    fakes = [
        replace(fake, precision=data.draw(precisions))
        for fake in data.draw(st.lists(FAKES, min_size=1, max_size=4))
    ]
    World(
        Scenario(
            fakes=tuple(fakes),
            asks=tuple(tiered),
            changes=tuple(data.draw(st.lists(CHANGES, max_size=4))),
            policy=data.draw(POLICIES),
            together=data.draw(st.booleans()),
            tiers=tuple(tiers),
        )
    ).play()


def test_the_tightest_limit_goes_first_and_no_tier_waits_for_ever() -> None:
    order = OrderPolicy(max_penalty_s=60.0)
    first = Tier(name="first", overload=OverloadAction.FIRST)
    chat = Tier(name="chat", ttft_s=0.5)
    heavy = Tier(name="heavy", ttft_s=4.0, weight=16.0)
    bulk = Tier(name="bulk")
    shifts = [shift_s(order, Promise.of(tier), 100) for tier in (first, heavy, chat, bulk)]
    assert shifts == [-60.0, 0.25, 0.5, 60.0]
    assert shift_s(order, None, 100) == 0.0


@given(st.floats(0.01, 100), st.none() | st.floats(0.001, 10), st.integers(1, 10_000))
def test_an_end_to_end_limit_leaves_at_least_half_of_it_for_the_first_token(
    e2e_s: float, tpot_s: float | None, output: int
) -> None:
    due_s = Promise.of(Tier(name="t", e2e_s=e2e_s, tpot_s=tpot_s)).first_token_s(output)
    assert due_s is not None
    assert e2e_s / 2 <= due_s <= e2e_s


def test_a_client_can_only_tighten() -> None:
    tier = Tier(name="t", ttft_s=1.0)
    promise = Promise.of(tier, ttft_s=5.0, tpot_s=0.02)
    assert (promise.ttft_s, promise.tpot_s) == (1.0, 0.02)
    assert Promise.of(tier, ttft_s=0.3).ttft_s == 0.3


def test_a_request_overflows_only_among_the_replicas_of_its_tier() -> None:
    tight, bulk = Tier(name="tight", tpot_s=0.02), Tier(name="bulk")
    driver = Driver(policy=DispatchPolicy(overflow_s=0.0))
    replicas = [replica_of("r0", Fake(most=1)), replica_of("r1", Fake(most=9))]
    driver.at(0.0, on.TableChanged(table_of(replicas, tiers=(tight, bulk))))
    sent = [driver.at(0.0, arrival(number, 0.0, Ask(tier=tight))) for number in range(3)]
    names = [item.replica.id for told in sent for item in told if isinstance(item, do.Send)]
    assert names == ["r0"]
    told = driver.at(0.0, on.TableChanged(table_of(replicas[1:], tiers=(tight, bulk))))
    # Without a replica of its tier it goes where it may go.
    assert [item.replica.id for item in told if isinstance(item, do.Send)] == ["r1"] * 2


def test_a_promise_that_cannot_be_kept_is_refused_at_once_with_the_seconds_until_it_could() -> None:
    tier = Tier(name="t", ttft_s=1.0, overload=OverloadAction.REJECT)
    driver = Driver()
    driver.at(0.0, on.TableChanged(table_of([replica_of("r0", Fake(most=1))], tiers=(tier,))))
    # 10 tokens in at 10 ms, 50 out at 100 ms.
    sent = driver.at(0.0, arrival(0, 0.0, Ask(output=50, tier=tier)))
    assert any(isinstance(item, do.Send) for item in sent)
    refused = driver.at(0.0, arrival(1, 0.0, Ask(output=50, tier=tier)))
    command = next(item for item in refused if isinstance(item, do.Refuse))
    assert command.refusal is do.Refusal.PROMISE
    # One slot of 5.1 s, then 0.1 s of its own prompt; 1 s is allowed.
    assert command.retry_after_s == math.ceil(5.1 + 0.1 - 1.0)


def test_a_late_request_of_a_shedding_tier_is_refused_and_of_a_demoting_one_served_last() -> None:
    for action, expected in ((OverloadAction.SHED, do.Refuse), (OverloadAction.DEMOTE, do.Demote)):
        tier = Tier(name="t", ttft_s=1.0, overload=action)
        driver = Driver()
        driver.at(0.0, on.TableChanged(table_of([replica_of("r0", Fake(most=1))], tiers=(tier,))))
        driver.at(0.0, arrival(0, 0.0, Ask(tier=tier)))
        driver.at(0.0, arrival(1, 0.0, Ask(tier=tier)))
        told = [*driver.at(2.0, on.Tick()), *driver.at(2.0, on.Finished(0))]
        assert any(isinstance(item, expected) for item in told), action


LOADS = st.builds(
    ReplicaLoad,
    replica=st.just("r"),
    work_s=st.floats(0.1, 100),
    inflight=st.integers(1, 50),
    max_inflight=st.integers(1, 50),
    prefill_s_per_token=st.floats(1e-5, 0.1),
    decode_s_per_token=st.just(0.01),
    prompt_s=st.floats(0, 10),
    slots=st.integers(0, 5),
)


@given(st.lists(LOADS, max_size=4), st.integers(0, 50), st.integers(1, 1000))
def test_more_requests_ahead_or_fewer_replicas_never_promise_an_earlier_token(
    loads: list[ReplicaLoad], ahead: int, tokens: int
) -> None:
    def expected(loads: list[ReplicaLoad], ahead: int) -> float:
        return first_token_in_s(
            loads,
            prompt_tokens=tokens,
            first_token_s=0.1,
            ahead=ahead,
            ahead_tokens=ahead * tokens,
        )

    now = expected(loads, ahead)
    assert now >= 0.1
    assert expected(loads, ahead + 1) >= now * (1 - 1e-9)


def test_status_tells_of_each_tier_what_was_kept() -> None:
    tiers = (Tier(name="a", ttft_s=0.5, precisions=(Precision.BF16,)), Tier(name="b"))
    kept, none = tier_rows(tiers, {"a": {"kept": 3, "missed": 1}, "gone": {"kept": 1}})
    assert (kept["attainment"], kept["ttft_ms"], kept["precisions"]) == (0.75, 500.0, ["bf16"])
    assert (none["attainment"], none["requests"]) == (None, {})


@given(
    TIERS,
    st.none() | st.floats(0.01, 100),
    st.none() | st.floats(0.001, 1),
    st.integers(1, 1000),
)
def test_limits_that_a_client_tightens_buy_no_turn_before_others_of_the_tier(
    tier: Tier, ttft_s: float | None, tpot_s: float | None, output: int
) -> None:
    usual, tightened = Promise.of(tier), Promise.of(tier, ttft_s=ttft_s, tpot_s=tpot_s)
    order = OrderPolicy()
    assert shift_s(order, tightened, output) == shift_s(order, usual, output)
    states = [
        RequestState(
            number=0,
            arrival_s=0.0,
            request=Request(
                id="0",
                arrival_s=0.0,
                workload_type="t",
                prompt_tokens=1,
                output_tokens=output,
                promise=promise,
            ),
            rank_s=0.0,
            streams=True,
            forecast=None,
        )
        for promise in (usual, tightened)
    ]
    assert states[0].urgency_s == states[1].urgency_s
    assert states[0].due_s == states[1].due_s


def test_a_tightened_limit_counts_where_the_tier_rejects() -> None:
    tier = Tier(name="t", ttft_s=9.0, overload=OverloadAction.REJECT)
    driver = Driver()
    driver.at(0.0, on.TableChanged(table_of([replica_of("r0", Fake(most=1))], tiers=(tier,))))
    driver.at(0.0, arrival(0, 0.0, Ask(output=50, tier=tier)))
    # As in the test above it takes 5.2 s.
    usual = arrival(1, 0.0, Ask(output=50, tier=tier))
    assert not any(isinstance(item, do.Refuse) for item in driver.at(0.0, usual))
    tight = arrival(2, 0.0, Ask(output=50, tier=tier))
    assert tight.request is not None
    promise = Promise.of(tier, ttft_s=1.0)
    told = structs.replace(tight, request=structs.replace(tight.request, promise=promise))
    refused = [item for item in driver.at(0.0, told) if isinstance(item, do.Refuse)]
    assert [item.refusal for item in refused] == [do.Refusal.PROMISE]
