"""Counts of several gateway processes reach the hub once; operators' calls pass through it."""

import math
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from oserve.control.dispatch.table import RoutingTable, TableReplica
from oserve.core import Endpoint, LengthClass, ReplicaPhase
from oserve.gateway.dispatch import Dispatcher, Picture
from oserve.gateway.process.hub import Hub, HubClient
from oserve.gateway.settings import GatewaySettings

TABLE = RoutingTable(
    plan_id="p",
    workload_types=(LengthClass(name="all"),),
    routing_shares={"all": {}},
    replicas=(),
)


async def test_nothing_is_lost_or_taken_twice(tmp_path: Path) -> None:
    async def operate(path: str, body: bytes) -> tuple[int, bytes]:
        return 409, path.encode() + body

    hub = Hub(operate)
    await hub.listen(str(tmp_path / "hub.sock"))
    hub.publish(TABLE, Picture())
    dispatchers = [Dispatcher(GatewaySettings(), None) for _ in range(2)]
    clients = [
        HubClient(str(tmp_path / "hub.sock"), item, index + 1)
        for index, item in enumerate(dispatchers)
    ]
    try:
        assert hub.counted_until_s == math.inf
        before_s = time.time()
        for client in clients:
            await client.sync()
        # Complete up to what the slower one has told.
        between_s = time.time()
        await clients[0].sync()
        assert before_s <= hub.counted_until_s <= between_s
        for second in range(20):
            for dispatcher, client in zip(dispatchers, clients, strict=True):
                dispatcher.foresight.tally.arrived(float(second), (1.0,))
                await client.sync()
                if second % 3 == 0:
                    # Taken by the hub, but its answer was lost: the same batch comes again.
                    tally = dispatcher.foresight.tally
                    tally.arrived(float(second), (1.0,))
                    batch = tally.take()
                    await client.sync()
                    tally._sent = batch
                    await client.sync()
        batches = hub.batches()
        assert all(batch.names == ("all",) for batch in batches)
        counted = sum(row[0] for batch in batches for row in batch.arrivals.values())
        assert counted == 2 * (20 + 7)
        assert hub.batches() == []
        assert await clients[0].operate("/oserve/v1/plan", b"!") == (409, b"/oserve/v1/plan!")
    finally:
        for client in clients:
            await client.close()
        await hub.close()


async def test_a_process_goes_on_with_the_hub_of_another_server(tmp_path: Path) -> None:
    socket = tmp_path / "hub.sock"
    dispatcher = Dispatcher(GatewaySettings(), None)
    client = HubClient(str(socket), dispatcher)
    first = Hub()
    await first.listen(str(socket))
    first.publish(TABLE, Picture())
    await client.sync()
    assert dispatcher.table == TABLE
    client.port = 7
    dispatcher.metrics.count("oserve_requests", "completed")
    await client.sync()
    await first.close()
    # Nobody is there: it serves on by what it knows, and counts.
    with pytest.raises(ConnectionError):
        await client.sync()
    assert dispatcher.table == TABLE
    dispatcher.foresight.tally.arrived(5.0, (1.0,))
    socket.unlink(missing_ok=True)
    second = Hub()
    await second.listen(str(socket))
    listening = second.expect(os.getpid())
    # One that has no table yet takes nothing away.
    await client.sync()
    assert dispatcher.table == TABLE
    assert listening.result() == 7
    other = replace(TABLE, plan_id="q")
    second.publish(other, Picture())
    await client.sync()
    assert dispatcher.table == other
    assert [batch.arrivals for batch in second.batches()] == [{5: [1.0]}]
    counted = dispatcher.picture.metrics["oserve_requests"]
    # What a process counted that ended is still in the sum, once, even if it is slow to end.
    second.forget(os.getpid())
    for _ in range(2):
        await client.sync()
        assert dispatcher.picture.metrics["oserve_requests"] == counted
    await client.close()
    await second.close()


async def test_every_process_hears_of_a_hand_over_once_only_of_that_start(tmp_path: Path) -> None:
    def table(started_s: float) -> RoutingTable:
        replicas = (
            TableReplica(
                id="r",
                shape="s",
                phase=ReplicaPhase.READY,
                endpoint=Endpoint(url="http://127.0.0.1:1"),
                max_inflight=1,
                max_model_len=0,
                accepts_priority=False,
                tells_token_ids=True,
                prefill_s_per_token=1e-4,
                decode_s_per_token=1e-3,
                started_s=started_s,
            ),
        )
        return replace(TABLE, replicas=replicas)

    hub = Hub()
    await hub.listen(str(tmp_path / "hub.sock"))
    hub.publish(table(1.0), Picture())
    dispatchers = [Dispatcher(GatewaySettings(), None) for _ in range(2)]
    clients = [
        HubClient(str(tmp_path / "hub.sock"), item, index + 1)
        for index, item in enumerate(dispatchers)
    ]

    async def serving() -> list[bool]:
        for client in clients:
            await client.sync()
            await client.sync()
        return ["r" in dispatcher.serving for dispatcher in dispatchers]

    try:
        assert await serving() == [True, True]
        hub.hand_over("r", 5.0)
        hub.hand_over("nobody", 5.0)
        assert await serving() == [False, False]
        hub.publish(table(2.0), Picture())
        assert await serving() == [True, True]
    finally:
        for client in clients:
            await client.close()
        await hub.close()
