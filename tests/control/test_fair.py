"""Fair shares: the bound of VTC, no credit for idle time, weights, locality within its debt."""

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from oserve.control.dispatch import events as on
from oserve.control.dispatch.commands import Record, Refusal, Refuse, Send
from oserve.control.dispatch.fair import FairQueue
from oserve.control.dispatch.fair_policy import FairPolicy
from oserve.control.dispatch.policy import DispatchPolicy
from oserve.control.dispatch.queue import RankQueue
from oserve.control.dispatch.state import RequestState
from oserve.core import FinishStatus, OverloadAction, Promise, Request, Tier

from .dispatch_driver import Driver, only
from .dispatch_scenario import Ask, Fake, arrival, replica_of

_TINY_S = 1e-6
TENANTS = ("a", "b", "c")
costs = st.floats(0.1, 10.0)
# An arrival (tenant, cost), or ``None``: the next one is served.
steps = st.lists(st.none() | st.tuples(st.sampled_from(TENANTS), costs), max_size=120)
weights = st.fixed_dictionaries({name: st.sampled_from([0.5, 1.0, 3.0]) for name in TENANTS})


def state_of(
    number: int,
    tenant: str,
    *,
    rank_s: float = 0.0,
    session: str = "",
    tier: Tier | None = None,
) -> RequestState:
    request = Request(
        id=str(number),
        arrival_s=0.0,
        workload_type="t",
        prompt_tokens=1,
        output_tokens=1,
        promise=None if tier is None else Promise.of(tier),
    )
    state = RequestState(
        number=number, arrival_s=0.0, request=request, rank_s=rank_s, streams=True, forecast=None
    )
    state.tenant, state.session = tenant, session
    return state


class Played:
    """Arrivals and services, with the check of the bound between those that wait all the time."""

    def __init__(self, policy: FairPolicy, saved: frozenset[str] = frozenset()) -> None:
        self.queue = FairQueue(lambda state: 1.0 if state.session in saved else 0.0)
        self.queue.use(policy)
        self.policy = policy
        self.cost: dict[int, float] = {}
        self.service = dict.fromkeys(TENANTS, 0.0)
        self.largest_s = 0.0
        self._since: dict[tuple[str, str], float] = {}

    def waits(self, tenant: str) -> bool:
        return any(item.tenant == tenant for item in self.queue)

    def arrive(self, tenant: str, cost: float, session: str = "") -> None:
        number = len(self.cost)
        self.cost[number] = cost
        self.largest_s = max(self.largest_s, cost / self.policy.weights.get(tenant, 1.0))
        self.queue.push(state_of(number, tenant, rank_s=float(number), session=session))
        self._watch()

    def serve(self) -> RequestState | None:
        state = self.queue.head()
        assert (state is None) == (len(self.queue) == 0)
        if state is not None:
            cost = self.cost[state.number]
            self.queue.charge(state, prompt_s=cost, per_token_s=0.0)
            self.queue.discard(state)
            self.service[state.tenant] += cost / self.policy.weights.get(state.tenant, 1.0)
            self._watch()
        return state

    def _watch(self) -> None:
        for one in TENANTS:
            for other in TENANTS:
                gap_s = self.service[one] - self.service[other]
                if self.waits(one) and self.waits(other):
                    self._since.setdefault((one, other), gap_s)
                    most_s = 2 * (self.largest_s + self.policy.debt_s)
                    assert abs(gap_s - self._since[one, other]) <= most_s + _TINY_S
                else:
                    self._since.pop((one, other), None)


@settings(max_examples=60)
@given(steps, weights, st.sampled_from([0.0, 5.0]))
def test_tenants_that_wait_never_differ_by_more_than_twice_the_largest_request(
    played: Sequence[tuple[str, float] | None], weight: dict[str, float], debt_s: float
) -> None:
    world = Played(FairPolicy(weights=weight, debt_s=debt_s), saved=frozenset({"a"}))
    for step in played:
        if step is None:
            world.serve()
        else:
            world.arrive(*step, session=step[0])
    while world.serve() is not None:
        pass


@settings(max_examples=60)
@given(steps, st.lists(st.floats(-0.9, 3.0), min_size=1, max_size=8))
def test_errors_of_estimates_add_no_more_than_their_sum(
    played: Sequence[tuple[str, float] | None], errors: list[float]
) -> None:
    """Whoever waits has a counter within the largest request and the errors since of the lowest."""
    queue = FairQueue()
    cost: dict[int, float] = {}
    wrong_s = largest_s = 0.0
    for step in played:
        if step is not None:
            number = len(cost)
            cost[number] = step[1]
            largest_s = max(largest_s, step[1])
            queue.push(state_of(number, step[0], rank_s=float(number)))
            continue
        state = queue.head()
        if state is None:
            continue
        charge = queue.charge(state, prompt_s=0.0, per_token_s=cost[state.number])
        queue.discard(state)
        error = errors[state.number % len(errors)]
        wrong_s += abs(error) * cost[state.number]
        queue.settle(charge, 1.0 + error)
        levels = [queue.flow(item).level_s for item in queue]
        if levels:
            assert max(levels) - min(levels) <= largest_s + wrong_s + _TINY_S


def test_idle_time_saves_no_credit_and_a_lone_tenant_gets_all() -> None:
    world = Played(FairPolicy())
    for _ in range(50):
        world.arrive("a", 1.0)
        found = world.serve()
        assert found is not None
        assert found.tenant == "a"
    for _ in range(10):
        world.arrive("a", 1.0)
        world.arrive("b", 1.0)
    first = [world.serve() for _ in range(10)]
    assert sorted(state.tenant for state in first if state is not None) == ["a"] * 5 + ["b"] * 5


def test_weights_and_long_against_short_share_device_seconds() -> None:
    world = Played(FairPolicy(weights={"a": 3.0}))
    for _ in range(400):
        world.arrive("a", 1.0)
        world.arrive("b", 5.0)
    for _ in range(200):
        world.serve()
    ratio = world.service["a"] / world.service["b"]
    assert abs(ratio - 1.0) < 0.1


def test_a_cached_prefix_goes_first_within_the_debt_only() -> None:
    world = Played(FairPolicy(debt_s=3.0), saved=frozenset({"shared"}))
    for _ in range(20):
        world.arrive("a", 1.0, session="shared")
        world.arrive("b", 1.0, session="own")
    served = [state.tenant for _ in range(12) if (state := world.serve()) is not None]
    assert served[:4] == ["a"] * 4
    assert abs(served.count("a") - served.count("b")) <= 4


@given(st.lists(st.tuples(st.integers(0, 20), st.booleans()), max_size=40))
def test_without_tenants_the_order_is_that_of_the_rank(ranks: list[tuple[int, bool]]) -> None:
    fair, plain = FairQueue(), RankQueue()
    for number, (rank, late) in enumerate(ranks):
        state = state_of(number, "", rank_s=rank + 1e6 * late)
        state.demoted = late
        fair.push(state)
        plain.push(state)
    assert [item.number for item in fair.passing()] == [n for _, n in plain.in_order()]
    while (found := plain.head()) is not None:
        assert fair.head() is found
        fair.discard(found)
        plain.discard(found)
    assert len(fair) == 0


def test_counters_of_idle_tenants_are_dropped() -> None:
    queue = FairQueue()
    for number in range(5000):
        state = state_of(number, f"t{number}")
        queue.settle(queue.charge(state, prompt_s=1.0, per_token_s=0.0), 1.0)
        assert queue.flows < 2000


def test_a_look_for_idle_tenants_is_paid_for_by_as_many_new_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    queue, looks = FairQueue(), 0
    look = FairQueue._drop_idle

    def counted(queue: FairQueue) -> None:
        nonlocal looks
        looks += 1
        look(queue)

    monkeypatch.setattr(FairQueue, "_drop_idle", counted)
    for number in range(20_000):
        # Charges that are open keep them all.
        queue.charge(state_of(number, f"t{number}"), prompt_s=1.0, per_token_s=0.0)
    assert queue.flows == 20_000
    assert looks < 10


def test_what_other_processes_served_counts_here() -> None:
    queue = FairQueue()
    for number in range(8):
        queue.push(state_of(number, "ab"[number % 2], rank_s=float(number)))
    queue.charged_elsewhere({("", "a"): 2.5}, 0.0)
    served = []
    for _ in range(4):
        state = queue.head()
        assert state is not None
        queue.charge(state, prompt_s=1.0, per_token_s=0.0)
        queue.discard(state)
        served.append(state.tenant)
    assert served == ["b", "b", "b", "a"]
    assert queue.take_charges() == {("", "a"): 1.0, ("", "b"): 3.0}
    assert queue.take_charges() == {}


def test_who_is_served_elsewhere_only_has_no_credit_here() -> None:
    queue = FairQueue()
    for number in range(100):
        queue.charge(state_of(number, "a"), prompt_s=1.0, per_token_s=0.0)
    queue.push(state_of(100, "a"))
    queue.charged_elsewhere({("", "b"): 3.0}, 0.0)
    queue.push(state_of(101, "b"))
    assert queue.flow(state_of(102, "b")).level_s == 103.0


def comes(number: int, tenant: str, ask: Ask, max_queued: int | None = None) -> on.Arrived:
    told = arrival(number, 0.0, ask)
    return replace(told, tenant=tenant, owner=tenant, max_queued=max_queued)


def test_a_request_is_charged_where_it_runs_and_corrected_at_its_end() -> None:
    driver = Driver(replica_of("r0", Fake(most=1)))
    fair = driver.machine.waiting.fair
    driver.at(0.0, comes(1, "a", Ask(prompt=100, output=10)))
    assert fair.take_charges() == {("", "a"): 2.0}
    driver.at(0.0, comes(2, "a", Ask(output=1)), comes(3, "b", Ask(output=1)))
    commands = driver.at(1.0, on.Finished(1))
    ending = only(commands, Record)
    assert only(commands, Send).number == 3
    assert ending.charge is not None
    driver.machine.settle_charge(ending.charge, 5.0)
    # Of ten expected tokens there were five.
    assert abs(fair.take_charges()["", "a"] - -0.5) < _TINY_S


def test_a_failed_attempt_costs_its_tenant_nothing() -> None:
    driver = Driver(replica_of("r0"), replica_of("r1"))
    driver.at(0.0, comes(1, "a", Ask(prompt=100, output=10)))
    again = only(driver.at(1.0, on.Lost(number=1, reason="gone")), Send)
    assert again.replica.id == "r1"
    assert abs(driver.machine.waiting.fair.take_charges()["", "a"] - 2.0) < _TINY_S


def test_in_an_engine_a_late_comer_goes_before_what_a_flood_has_queued() -> None:
    driver = Driver(replica_of("r0", Fake(most=40)))
    driver.at(0.0, comes(0, "quiet", Ask(output=10)))
    driver.at(0.0, on.Streams(0))
    flood = [
        only(driver.at(0.0, comes(number, "flood", Ask(output=10))), Send).rank_s
        for number in range(1, 11)
    ]
    assert flood == sorted(flood)
    quiet = only(driver.at(0.5, comes(11, "quiet", Ask(output=10))), Send).rank_s
    assert sum(rank < quiet for rank in flood) <= 1


def test_a_tenant_that_is_alone_has_the_ranks_that_it_has_without_fair_shares() -> None:
    tiers = [Tier(name="a", ttft_s=1.0), Tier(name="b", overload=OverloadAction.FIRST)]
    asks = [Ask(prompt=10 * n, output=n, tier=tiers[n % 2]) for n in range(1, 9)]
    ranks = []
    for tenant in ("", "only"):
        driver = Driver(replica_of("r0", Fake(most=20)))
        told = [driver.at(float(n), comes(n, tenant, ask)) for n, ask in enumerate(asks)]
        ranks.append([only(commands, Send).rank_s for commands in told])
        # Two tiers are no two tenants: nothing is left free.
        assert not driver.machine.waiting.fair.several
    assert ranks[0] == ranks[1]


def test_a_flood_leaves_a_slot_free_while_others_are_active() -> None:
    driver = Driver(replica_of("r0", Fake(most=8)))
    for number in range(1, 11):
        driver.at(0.0, comes(number, "flood", Ask()))
    assert driver.waiting == {9, 10}
    driver.at(1.0, comes(11, "quiet", Ask()))
    assert driver.waiting == {9, 10, 11}
    for number in range(1, 7):
        driver.at(2.0, on.Finished(number))
    # Of four that run at once the flood leaves one free.
    assert driver.place(11) == "r0"
    assert driver.waiting == {9, 10}
    driver.at(2.0, on.Streams(7), on.Streams(8), on.Streams(11))
    driver.at(3.0, on.Finished(11))
    assert driver.waiting == {10}
    driver.at(70.0, comes(12, "flood", Ask()))
    assert driver.waiting == set()


def test_the_last_slots_of_a_flood_are_filled_with_one_prompt_at_a_time() -> None:
    policy = DispatchPolicy(fair=FairPolicy(reserve=0.2))
    driver = Driver(replica_of("r0", Fake(most=20)), policy=policy)
    driver.at(0.0, comes(1, "quiet", Ask()))
    driver.at(0.0, on.Streams(1), on.Finished(1))
    for number in range(2, 12):
        driver.at(1.0, comes(number, "flood", Ask()))
    # Two of ten slots stay free, and two more while a prompt is owed.
    assert driver.waiting == set(range(8, 12))
    driver.at(1.0, *(on.Streams(number) for number in range(2, 8)))
    assert driver.waiting == set(range(9, 12))
    driver.at(1.0, on.Streams(8))
    assert driver.waiting == set(range(10, 12))
    driver.at(1.0, on.Streams(9))
    assert driver.waiting == set(range(10, 12))


def test_a_share_of_the_slots_is_that_of_the_processes_that_report() -> None:
    driver = Driver(replica_of("r0", Fake(most=8)))
    alone = driver.machine.fleet.slots
    driver.at(0.0, on.LoadElsewhere({}, 4))
    assert driver.machine.fleet.slots == alone / 4
    driver.at(0.0, on.LoadElsewhere({}, 0))
    assert driver.machine.fleet.slots == alone / 4


def test_a_full_queue_is_kept_by_no_tenant_alone() -> None:
    policy = DispatchPolicy(max_queued=4)
    driver = Driver(replica_of("r0", Fake(most=1)), policy=policy)
    for number in range(1, 6):
        driver.at(0.0, comes(number, "flood", Ask()))
    assert only(driver.at(0.0, comes(6, "flood", Ask())), Refuse).number == 6
    assert only(driver.at(0.0, comes(7, "quiet", Ask())), Refuse).number == 5
    assert driver.waiting == {2, 3, 4, 7}
    ending = only(driver.at(1.0, on.Finished(1, FinishStatus.COMPLETED)), Send)
    assert ending.number == 7


def test_a_tenant_may_not_queue_more_than_its_limit() -> None:
    driver = Driver(replica_of("r0", Fake(most=1)))
    for number in range(1, 4):
        driver.at(0.0, comes(number, "a", Ask(), max_queued=2))
    assert only(driver.at(0.0, comes(4, "a", Ask(), max_queued=2)), Refuse).number == 4
    driver.at(0.0, comes(5, "b", Ask(), max_queued=2))
    assert driver.waiting == {2, 3, 5}


def test_a_limit_of_waiting_requests_is_that_of_all_tiers_and_holds_without_fair_shares() -> None:
    driver = Driver(replica_of("r0", Fake(most=1)))
    tiers = [Tier(name="a"), Tier(name="b")]
    for number in range(1, 4):
        told = comes(number, "a", Ask(tier=tiers[number % 2]), max_queued=2)
        driver.at(0.0, replace(told, tenant=""))
    told = comes(4, "a", Ask(tier=tiers[0]), max_queued=2)
    assert only(driver.at(0.0, replace(told, tenant="")), Refuse).number == 4
    driver.at(1.0, on.Finished(1))
    driver.at(1.0, told)
    assert 4 in driver.waiting


URGENCIES = [
    Tier(name="first", overload=OverloadAction.FIRST),
    Tier(name="tight", ttft_s=0.5),
    Tier(name="normal", ttft_s=5.0),
    Tier(name="bulk"),
]


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(0, 3), st.booleans()),
        min_size=1,
        max_size=40,
    )
)
def test_a_full_queue_never_gives_up_what_is_more_urgent_than_who_comes(
    comers: list[tuple[str, int, bool]],
) -> None:
    queue = FairQueue()
    for number, (tenant, tier, demoted) in enumerate(comers):
        state = state_of(number, tenant, tier=URGENCIES[tier])
        state.demoted = demoted
        queue.push(state)
    comer = state
    comer.demoted = False
    queue.push(comer)
    given_up = queue.crowded_out(comer)
    counts = Counter(item.tenant for item in queue)
    if given_up is not comer:
        assert given_up.demoted or given_up.urgency_s >= comer.urgency_s
        assert counts[given_up.tenant] > counts[comer.tenant]
    else:
        larger = [item for item in queue if counts[item.tenant] > counts[comer.tenant]]
        assert all(not i.demoted and i.urgency_s < comer.urgency_s for i in larger)


def test_a_bulk_request_takes_no_place_from_a_tight_one() -> None:
    policy = DispatchPolicy(max_queued=3)
    driver = Driver(replica_of("r0", Fake(most=1)), policy=policy)
    tight, bulk = Tier(name="tight", ttft_s=1.0), Tier(name="bulk")
    for number in range(1, 5):
        driver.at(0.0, comes(number, "busy", Ask(tier=tight)))
    assert only(driver.at(0.0, comes(5, "other", Ask(tier=bulk))), Refuse).number == 5
    assert only(driver.at(0.0, comes(6, "other", Ask(tier=tight))), Refuse).number == 4


def test_a_fault_between_booking_and_sending_leaves_neither_booking_nor_charge(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = Driver(replica_of("r0"))
    fair = driver.machine.waiting.fair

    def fails(*_: object) -> float:
        raise ZeroDivisionError

    monkeypatch.setattr(fair, "engine_rank_s", fails)
    commands = driver.at(0.0, comes(1, "a", Ask()))
    assert only(commands, Refuse).refusal is Refusal.INTERNAL
    assert driver.machine.fleet.ledger.own() == {"r0": (0.0, 0)}
    charge = only(commands, Record).charge
    assert charge is not None
    driver.machine.settle_charge(charge, 0.0)
    assert fair.take_charges() == {("", "a"): 0.0}
    assert charge.counter.open == 0
