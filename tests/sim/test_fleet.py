"""A fleet as its users see it: results, routing, sessions, moves, and stopping at any moment."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oserve.control.dispatch.order import OrderPolicy
from oserve.core import ReplicaPhase, ReplicaShape, Role
from oserve.perf import TokenCosts
from oserve.perf.costs import measured_costs
from oserve.perf.known_models import find_model
from oserve.perf.sequence_cache import SequenceCache
from oserve.perf.source import RooflineSource
from oserve.sim import (
    GatewayOptions,
    Rebalance,
    RequestTable,
    RoutingPolicy,
    SimLink,
    SimulatedFleet,
    Status,
    step_tables,
)
from oserve.traces import Slo, synthesise

SOURCE = RooflineSource(find_model("llama-2-70b"))
SHAPE = ReplicaShape(
    tensor_parallel_size=4, max_num_batched_tokens=1024, max_num_seqs=32, device_kind="H100"
)
STEP = SOURCE.step_model(SHAPE)
TABLES = step_tables(STEP, SHAPE)
COSTS = measured_costs(STEP, SHAPE)


def table_of(
    count: int = 200, rate_rps: float = 4.0, *, session: int | None = None
) -> RequestTable:
    made = synthesise(rate_rps=rate_rps, duration_s=1e6, seed=7)
    trace = [request for request, _ in zip(made, range(count), strict=False)]
    return RequestTable.from_trace(trace, order=OrderPolicy())


def fleet_of(
    table: RequestTable,
    names: str = "ab",
    *,
    kv_tokens: int = 40_000,
    gateway: GatewayOptions | None = None,
    rebalance: Rebalance | None = None,
    closed_loop: int = 0,
    roles: dict[str, Role] | None = None,
) -> SimulatedFleet:
    fleet = SimulatedFleet(
        table, gateway=gateway, rebalance=rebalance, closed_loop=closed_loop, compiled=False
    )
    for name in names:
        role = (roles or {}).get(name, Role.BOTH)
        fleet.add_replica(
            name,
            ReplicaShape(
                tensor_parallel_size=4,
                max_num_batched_tokens=1024,
                max_num_seqs=32,
                device_kind="H100",
                role=role,
            ),
            TABLES,
            kv_tokens=kv_tokens,
            costs=COSTS,
            kv_bytes_per_token=327_680.0,
            link=SimLink(bytes_per_s=25e9, latency_s=0.001),
        )
    return fleet


def test_step_tables_tell_what_the_model_tells() -> None:
    for prompt, decoding, cached in ((0, 1, 500), (0, 32, 50_000), (700, 0, 0), (512, 30, 30_000)):
        attended = prompt * 400
        told = float(STEP.step_s(prompt, attended, decoding, cached))
        assert TABLES.seconds(prompt, attended, decoding, cached) == pytest.approx(told, rel=0.01)


def test_results_say_the_same_as_every_other_measurement() -> None:
    fleet = fleet_of(table_of())
    fleet.run()
    results = fleet.results()
    assert (results.status == Status.COMPLETED).all()
    assert (results.made_tokens == results.output_tokens).all()
    assert sum(total.generated_tokens for total in results.totals) == results.output_tokens.sum()
    assert sum(total.prompt_tokens for total in results.totals) == results.prompt_tokens.sum()
    summary = results.summary(Slo(ttft_s=2.0, tpot_s=0.1))
    assert summary.completed == 200
    ttft = results.first_token_s - results.arrival_s
    assert summary.ttft_s.p50 == pytest.approx(np.percentile(ttft, 50))
    assert summary.e2e_s.p99 == pytest.approx(
        np.percentile(results.finish_s - results.arrival_s, 99)
    )
    few = results.summary(Slo(), results.class_index == 1)
    assert few.sent == 0
    for total in results.totals:
        assert 0 < total.busy_s < fleet.now_s


def test_the_use_of_kv_cache_is_that_of_the_requests() -> None:
    # One request: 160 prompt tokens are 10 blocks, and 320 answers take another 20, one by one.
    fleet = fleet_of(RequestTable.of([1.0], [160], [320]), "a")
    fleet.run()
    results = fleet.results()
    (totals,) = results.totals
    decoded_s = float(results.finish_s[0] - results.first_token_s[0])
    assert totals.kv_blocks == 2500
    assert totals.kv_peak_blocks == 30
    prompt_block_s = 10 * (results.first_token_s[0] - 1.0)
    assert totals.kv_block_s == pytest.approx(prompt_block_s + 20.5 * decoded_s, rel=0.05)


def test_states_bound_the_sequences_that_run() -> None:
    """A pool of 100 blocks, of which each sequence holds 9 for states and one for its tokens."""
    fleet = SimulatedFleet(RequestTable.of([0.0] * 30, [64] * 30, [64] * 30), compiled=False)
    fleet.add_replica(
        "a",
        SHAPE,
        TABLES,
        kv_tokens=1 << 20,
        costs=COSTS,
        cache=SequenceCache(blocks=100, block_tokens=1056, state_blocks=9),
    )
    fleet.advance(1.0)
    assert fleet.replicas()[0].running == 10
    fleet.run()
    assert (fleet.results().status == Status.COMPLETED).all()
    assert fleet.results().totals[0].kv_peak_blocks == 100


@settings(max_examples=10, deadline=None)
@given(st.lists(st.floats(0, 60), max_size=5))
def test_the_use_of_kv_cache_does_not_depend_on_stops_or_jumps(stops: list[float]) -> None:
    table = table_of(60)
    straight, stopped = fleet_of(table), fleet_of(table)
    stepwise = SimulatedFleet(table, compiled=False, skip=False)
    stepwise.add_replica("a", SHAPE, TABLES, kv_tokens=40_000, costs=COSTS)
    single = fleet_of(table, "a")
    peaks = np.zeros(2)
    for stop_s in sorted(stops):
        stopped.advance(stop_s)
        taken = stopped.take_totals()
        peaks = np.maximum(peaks, [totals.kv_peak_blocks for totals in taken])
    for fleet in (straight, stopped, stepwise, single):
        fleet.run()
    peaks = np.maximum(peaks, [totals.kv_peak_blocks for totals in stopped.take_totals()])
    for one, other, peak in zip(
        straight.results().totals, stopped.results().totals, peaks, strict=True
    ):
        assert one.kv_block_s == pytest.approx(other.kv_block_s, rel=0.01)
        assert one.kv_peak_blocks == peak
        assert 0 < one.kv_block_s < one.kv_peak_blocks * straight.now_s
    (one,), (other,) = single.results().totals, stepwise.results().totals
    assert one.kv_peak_blocks == other.kv_peak_blocks
    assert one.kv_block_s == pytest.approx(other.kv_block_s, rel=0.01)


def test_a_removed_replica_holds_no_kv_cache() -> None:
    fleet = fleet_of(table_of(20))
    fleet.advance(3.0)
    fleet.remove("a")
    (before, _) = fleet.take_totals()
    fleet.run()
    (after, _) = fleet.take_totals()
    assert before.kv_block_s == after.kv_block_s > 0
    assert after.kv_peak_blocks == 0


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0, 60), max_size=5))
def test_stopping_to_look_changes_nothing(stops: list[float]) -> None:
    table = table_of(60)
    straight, stopped = fleet_of(table), fleet_of(table)
    straight.run()
    arrivals = 0
    for stop_s in sorted(stops):
        stopped.advance(stop_s)
        seen = stopped.observe()
        assert seen.now_s == pytest.approx(stop_s)
        arrivals += int(seen.arrivals.sum())
        assert arrivals == int((table.arrival_s <= stop_s).sum())
        for replica in seen.replicas:
            assert replica.inflight == replica.running + replica.waiting
            assert 0.0 <= replica.kv_usage <= 1.0
    stopped.run()
    one, other = straight.results(), stopped.results()
    assert (one.finish_s == other.finish_s).all()
    assert (one.first_token_s == other.first_token_s).all()


def test_fixed_shares_are_followed_and_blind() -> None:
    fleet = fleet_of(table_of(400, 6.0), "abc", kv_tokens=400_000)
    fleet.set_routing(RoutingPolicy.FIXED_SHARES, {0: {"a": 0.5, "b": 0.3, "c": 0.2}})
    fleet.run()
    counts = Counter(fleet.results().replica.tolist())
    assert [counts[index] for index in range(3)] == [200, 120, 80]


def test_the_next_turn_of_a_session_is_not_computed_again() -> None:
    table = RequestTable.of([0.0, 50.0], [1000, 1500], [50, 50], session=[9, 9])
    fleet = fleet_of(table, "a")
    fleet.run()
    results = fleet.results()
    # 1000 + 50 tokens, the last of which was never computed, in whole blocks.
    assert results.reused_tokens.tolist() == [0, 1049 // 16 * 16]
    first, second = results.first_token_s - results.arrival_s
    assert second < 0.7 * first
    crowded = fleet_of(table, "a", kv_tokens=1600)
    crowded.run()
    assert crowded.results().reused_tokens.tolist() == [0, 1040]


def test_what_does_not_fit_is_refused_and_what_is_too_late_is_shed() -> None:
    table = RequestTable.of([0.0, 0.0], [100, 10_000], [10, 10])
    fleet = fleet_of(table, "a", kv_tokens=5000)
    fleet.run()
    assert fleet.results().status.tolist() == [Status.COMPLETED, Status.REFUSED]
    crowd = table_of(400, 100.0)
    fleet = fleet_of(crowd, "a", gateway=GatewayOptions(demote_after_s=2.0, shed_after_s=6.0))
    fleet.run()
    results = fleet.results()
    shed = results.status == Status.SHED
    assert 0 < shed.sum() < 400
    assert np.allclose((results.finish_s - results.arrival_s)[shed], 6.0)
    assert results.summary(Slo()).failed == shed.sum()


def test_a_full_queue_refuses() -> None:
    fleet = fleet_of(table_of(300, 1000.0), "a", gateway=GatewayOptions(max_queued=10))
    fleet.run()
    counts = Counter(fleet.results().status.tolist())
    assert counts[Status.COMPLETED] >= 64 + 10
    assert counts[Status.COMPLETED] + counts[Status.REFUSED] == 300


def test_a_small_request_passes_one_that_waits_for_a_larger_replica() -> None:
    # 3,200 tokens fit into the large replica only, which has no room before its first one ends.
    table = RequestTable.of([0.0, 0.1, 0.2], [3000, 3000, 100], [200, 200, 20])
    fleet = SimulatedFleet(table, compiled=False)
    for name, kv_tokens in (("small", 2000), ("large", 8000)):
        fleet.add_replica(name, SHAPE, TABLES, kv_tokens=kv_tokens, costs=COSTS, max_inflight=1)
    fleet.run()
    results = fleet.results()
    assert results.replica.tolist() == [1, 1, 0]
    assert results.dispatch_s[2] == pytest.approx(0.2)
    assert results.dispatch_s[1] == results.finish_s[0]


def test_a_request_is_shed_at_its_limit_wherever_it_waits() -> None:
    # The second has the better rank, so the first is never the head of the queue.
    table = RequestTable.of(
        [0.0, 0.0, 1.0, 1.5], [3000, 100, 100, 100], [400, 400, 10, 10], rank_s=[0, 0, 9, 2]
    )
    options = GatewayOptions(shed_after_s=1.0, max_queued=2)
    fleet = SimulatedFleet(table, compiled=False, gateway=options)
    fleet.add_replica("a", SHAPE, TABLES, kv_tokens=40_000, costs=COSTS, max_inflight=2)
    fleet.advance(2.0)
    results = fleet.results()
    assert results.status.tolist()[2:] == [Status.SHED, Status.QUEUED]
    assert results.finish_s[2] == pytest.approx(2.0)


@pytest.mark.parametrize("replay", [True, False])
def test_a_crash_replays_or_loses_what_was_there(replay: bool) -> None:
    fleet = fleet_of(table_of(100, 20.0))
    fleet.advance(3.0)
    before = {replica.name: replica.inflight for replica in fleet.observe().replicas}
    fleet.remove("a", replay=replay)
    fleet.remove("a", replay=replay)
    assert [replica.name for replica in fleet.observe().replicas] == ["b"]
    fleet.run()
    results = fleet.results()
    counts = Counter(results.status.tolist())
    if replay:
        assert counts == {Status.COMPLETED: 100}
        assert results.replays.sum() == before["a"]
    else:
        assert counts[Status.LOST] == before["a"]


def test_a_draining_replica_gets_no_more_and_ends_what_it_has() -> None:
    fleet = fleet_of(table_of(100, 20.0))
    fleet.advance(2.0)
    fleet.drain("a")
    had = fleet.observe().replicas[0].inflight
    seen = fleet.observe().replicas[0]
    assert seen.phase is ReplicaPhase.DRAINING
    assert had > 0
    fleet.run()
    assert fleet.replicas()[0].inflight == 0
    assert (fleet.results().status == Status.COMPLETED).all()


def test_prompts_here_and_answers_there() -> None:
    roles = {"a": Role.PREFILL, "b": Role.DECODE}
    fleet = fleet_of(table_of(50, 1.0), roles=roles)
    fleet.run()
    results = fleet.results()
    assert (results.status == Status.COMPLETED).all()
    prefill, decode = results.totals
    assert prefill.generated_tokens == 50
    assert decode.prompt_tokens == 0
    long = results.output_tokens > 1
    assert (results.replica[long] == 1).all()


def test_a_running_request_moves_and_hardly_pauses() -> None:
    table = RequestTable.of([0.0], [4000], [500])
    still, moved = fleet_of(table), fleet_of(table)
    still.run()
    moved.advance(2.0)
    assert moved.migrate(0, "b")
    assert not moved.migrate(0, "b")
    moved.run()
    one, other = still.results(), moved.results()
    assert other.replica.tolist() == [1]
    pause_s = float(other.finish_s[0] - one.finish_s[0])
    # The copy takes 50 ms; only the latency and a few tokens' KV are felt.
    assert 0.001 <= pause_s < 0.005


def test_rebalancing_empties_the_fuller_replica() -> None:
    count = 40
    table = RequestTable.of([0.0] * count, [900] * count, [300] * count)
    options = Rebalance(interval_s=0.5, source_below=1000.0, target_above=0.0, moves=4)
    fleet = fleet_of(table, "a", rebalance=options)
    fleet.advance(1.0)
    fleet.add_replica("b", SHAPE, TABLES, kv_tokens=40_000, costs=COSTS, ready_at_s=1.2)
    fleet.run()
    results = fleet.results()
    assert (results.status == Status.COMPLETED).all()
    assert results.totals[1].generated_tokens > 0


def test_a_closed_loop_keeps_so_many_in_flight() -> None:
    count = 64
    table = RequestTable.of([0.0] * count, [200] * count, [20] * count)
    fleet = fleet_of(table, "a", closed_loop=8)
    for step in range(1, 30):
        fleet.advance(0.1 * step)
        if fleet.ended < count - 8:
            assert fleet.replicas()[0].inflight == 8
    fleet.run()
    assert fleet.ended == count


def test_limits_that_make_no_sense_are_refused() -> None:
    table = table_of(3)
    fleet = fleet_of(table, "a")
    with pytest.raises(ValueError, match="already"):
        fleet.add_replica("a", SHAPE, TABLES, kv_tokens=1000, costs=COSTS)
    narrow = ReplicaShape(max_num_batched_tokens=8, max_num_seqs=16)
    costs = TokenCosts(prefill_s_per_token=1.0, decode_s_per_token=1.0)
    with pytest.raises(ValueError, match="max_num_seqs"):
        fleet.add_replica("x", narrow, TABLES, kv_tokens=1000, costs=costs)
    with pytest.raises(ValueError, match="ascend"):
        RequestTable.of([2.0, 1.0], [1, 1], [1, 1])
    with pytest.raises(ValueError, match="at least 1"):
        RequestTable.of([0.0], [0], [1])
    with pytest.raises(ValueError, match="shed"):
        GatewayOptions(demote_after_s=2.0, shed_after_s=1.0)
