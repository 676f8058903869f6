"""Counts of several gateway processes reach the hub once; operators' calls pass through it."""

import math
import os
import time
from dataclasses import replace
from pathlib import Path

import aiohttp
import msgspec
import pytest

from oserve.control.dispatch.constants import DispatchConstants
from oserve.control.dispatch.overload import OverloadPolicy
from oserve.control.dispatch.table import RoutingTable, TableReplica
from oserve.core import Endpoint, LengthClass, ReplicaPhase
from oserve.gateway.process.client import HubClient
from oserve.gateway.process.hub import Hub
from oserve.gateway.process.hub_lines import SocketLine
from oserve.gateway.process.messages import OperatorAnswer, OperatorCall
from oserve.gateway.runner import RequestRunner
from oserve.gateway.settings import GatewaySettings
from oserve.gateway.snapshot import ClusterSnapshot

TABLE = RoutingTable(
    plan_id="p",
    length_classes=(LengthClass(name="all"),),
    routing_shares={"all": {}},
    replicas=(),
)


async def test_nothing_is_lost_or_taken_twice(tmp_path: Path) -> None:
    async def operate(call: OperatorCall) -> OperatorAnswer:
        return OperatorAnswer(status=409, body=call.path.encode() + call.body)

    hub = Hub(operate)
    await hub.listen(str(tmp_path / "hub.sock"))
    hub.publish(TABLE, ClusterSnapshot())
    runners = [RequestRunner(GatewaySettings(), None) for _ in range(2)]
    clients = [
        HubClient(SocketLine(str(tmp_path / "hub.sock")), item, index + 1)
        for index, item in enumerate(runners)
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
            for runner, client in zip(runners, clients, strict=True):
                runner.estimator.tally.arrived(float(second), (1.0,))
                await client.sync()
                if second % 3 == 0:
                    # Taken by the hub, but its answer was lost: the same batch comes again.
                    tally = runner.estimator.tally
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
    runner = RequestRunner(GatewaySettings(), None)
    client = HubClient(SocketLine(str(socket)), runner)
    first = Hub()
    await first.listen(str(socket))
    first.publish(TABLE, ClusterSnapshot())
    await client.sync()
    assert runner.table == TABLE
    client.port = 7
    runner.metrics.count("oserve_requests", "completed")
    await client.sync()
    await first.close()
    # Nobody is there: it serves on by what it knows, and counts.
    with pytest.raises(ConnectionError):
        await client.sync()
    assert runner.table == TABLE
    runner.estimator.tally.arrived(5.0, (1.0,))
    socket.unlink(missing_ok=True)
    second = Hub()
    await second.listen(str(socket))
    listening = second.expect(os.getpid())
    # One that has no table yet takes nothing away.
    await client.sync()
    assert runner.table == TABLE
    assert listening.result() == 7
    tuned = DispatchConstants(overload=OverloadPolicy(ttft_s=2.0), inflight_per_device=4.0)
    other = replace(TABLE, plan_id="q", constants=tuned)
    second.publish(other, ClusterSnapshot())
    await client.sync()
    assert runner.table == other
    assert [batch.arrivals for batch in second.batches()] == [{5: [1.0]}]
    counted = runner.snapshot.metrics["oserve_requests"]
    # What a process counted that ended is still in the sum, once, even if it is slow to end.
    second.forget(os.getpid())
    for _ in range(2):
        await client.sync()
        assert runner.snapshot.metrics["oserve_requests"] == counted
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
                returns_token_ids=True,
                prefill_s_per_token=1e-4,
                decode_s_per_token=1e-3,
                started_s=started_s,
            ),
        )
        return replace(TABLE, replicas=replicas)

    hub = Hub()
    await hub.listen(str(tmp_path / "hub.sock"))
    hub.publish(table(1.0), ClusterSnapshot())
    runners = [RequestRunner(GatewaySettings(), None) for _ in range(2)]
    clients = [
        HubClient(SocketLine(str(tmp_path / "hub.sock")), item, index + 1)
        for index, item in enumerate(runners)
    ]

    async def serving() -> list[bool]:
        for client in clients:
            await client.sync()
            await client.sync()
        return ["r" in runner.serving for runner in runners]

    try:
        assert await serving() == [True, True]
        hub.hand_over("r", 5.0)
        hub.hand_over("nobody", 5.0)
        assert await serving() == [False, False]
        hub.publish(table(2.0), ClusterSnapshot())
        assert await serving() == [True, True]
    finally:
        for client in clients:
            await client.close()
        await hub.close()


async def test_a_message_that_is_none_is_refused_and_the_hub_goes_on(tmp_path: Path) -> None:
    socket = str(tmp_path / "hub.sock")
    hub = Hub()
    await hub.listen(socket)
    hub.publish(TABLE, ClusterSnapshot())
    session = aiohttp.ClientSession(connector=aiohttp.UnixConnector(socket))
    try:
        for body in (b"", b"{}", b'{"type": "report"}', b'{"type": "other"}'):
            async with session.post("http://hub/message", data=body) as answer:
                assert answer.status == 400
        async with session.post("http://hub/other", data=b"{}") as answer:
            assert answer.status == 404
        # Without a server behind it, an operator's call is answered all the same.
        call = msgspec.json.encode(OperatorCall(path="/oserve/v1/plan", body=b""))
        async with session.post("http://hub/message", data=call) as answer:
            found = msgspec.json.decode(await answer.read(), type=OperatorAnswer)
        assert found.status == 503
    finally:
        await session.close()
        await hub.close()


async def test_documents_of_the_cluster_come_when_somebody_asks(tmp_path: Path) -> None:
    """In every report those of a large cluster would be megabytes each second."""
    hub = Hub()
    await hub.listen(str(tmp_path / "hub.sock"))
    runner = RequestRunner(GatewaySettings(), None)
    client = HubClient(SocketLine(str(tmp_path / "hub.sock")), runner, 1)
    try:
        for number in (1, 2):
            hub.publish(
                TABLE,
                ClusterSnapshot(
                    status=msgspec.Raw(b'{"n":%d}' % number), gauges=[("g", [], float(number))]
                ),
            )
            # The first report has them in any case.
            await client.sync(whole=False)
            assert (bytes(runner.snapshot.status), runner.snapshot.gauges[0][2]) == (b'{"n":1}', 1)
        await client.sync()
        assert (bytes(runner.snapshot.status), runner.snapshot.gauges[0][2]) == (b'{"n":2}', 2)
    finally:
        await client.close()
        await hub.close()
