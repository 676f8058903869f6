"""Gateway processes of other nodes: found, started, called, and started again when they end."""

import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import pytest

from oserve.control.dispatch.table import RoutingTable, TableReplica
from oserve.core import (
    Endpoint,
    FinishStatus,
    HatchAddress,
    LengthClass,
    ReplicaPhase,
    RequestRecord,
    VirtualClock,
)
from oserve.gateway.process.client import HubClient
from oserve.gateway.process.home import localised
from oserve.gateway.process.hub import Hub
from oserve.gateway.process.hub_call import HubStreams
from oserve.gateway.process.hub_lines import CalledLine
from oserve.gateway.process.keeper import KeptProcess
from oserve.gateway.process.messages import (
    GatewayHome,
    GatewayWorkerConfig,
    HubReply,
    OperatorAnswer,
    OperatorCall,
    WorkerReport,
)
from oserve.gateway.process.node_gateway import GatewayPlan
from oserve.gateway.process.node_gateways import NodeGateways
from oserve.gateway.process.outbox import RecordOutbox
from oserve.gateway.runner import RequestRunner
from oserve.gateway.settings import GatewaySettings
from oserve.gateway.snapshot import ClusterSnapshot
from oserve.wire.hatch import known_name

LIMIT_S = 60.0
PLAN = GatewayPlan(
    count=1,
    settings=GatewaySettings(shutdown_grace_s=0.0),
    models=("m",),
    keys=frozenset({"k"}),
    alone_s=65.0,
)
TABLE = RoutingTable(
    plan_id="p",
    length_classes=(LengthClass(name="all"),),
    routing_shares={"all": {}},
    replicas=(),
)


def hatch_of(name: str) -> HatchAddress:
    return HatchAddress(host="10.0.0.1", port=1, certificate=f"certificate of {name}", token="t-9")


def replica(name: str, node: str) -> TableReplica:
    return TableReplica(
        id=name,
        shape="s",
        phase=ReplicaPhase.READY,
        endpoint=Endpoint(unix_socket=f"{name}-1/api.sock", hatch=hatch_of(node)),
        max_inflight=1,
        max_model_len=0,
        accepts_priority=False,
        returns_token_ids=True,
        prefill_s_per_token=1e-4,
        decode_s_per_token=1e-3,
    )


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


class Process:
    """A gateway process in this one: it only reports."""

    def __init__(self, pid: int, stamp: str, line: str, *, works: bool) -> None:
        self.pid = pid
        self.stamp = stamp
        self.ending = False
        self.config = msgspec.json.decode(line, type=GatewayWorkerConfig)
        self.runner = RequestRunner(self.config.settings, None)
        self.outbox = RecordOutbox()
        self.hub = CalledLine()
        self.client = HubClient(
            self.hub,
            self.runner,
            self.config.incarnation,
            home=self.config.home,
            outbox=self.outbox,
        )
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.lost: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.task = asyncio.create_task(self._run()) if works else None
        if not works:
            self.exit(1)
        Path(self.config.hub).parent.mkdir(exist_ok=True)
        Path(self.config.hub).unlink(missing_ok=True)

    async def _run(self) -> None:
        await self.hub.listen(self.config.hub)
        while True:
            with contextlib.suppress(ConnectionError):
                await self.client.sync(whole=False)
                self.client.port = 8000
            await asyncio.sleep(0.002)

    def exit(self, status: int) -> None:
        if not self.ended.done():
            self.ended.set_result(status)
        if self.task is not None:
            self.task.cancel()

    async def close(self) -> None:
        self.exit(-9)
        await self.client.close()

    async def wait(self) -> int:
        done, _ = await asyncio.wait({self.ended, self.lost}, return_when=asyncio.FIRST_COMPLETED)
        return done.pop().result()

    async def end(self, grace_s: float) -> None:
        del grace_s
        self.ending = True
        self.exit(0)
        await self.wait()


@dataclass
class Node:
    """A node and its keeper."""

    node: str
    folder: Path
    works: bool = True
    up: bool = True
    held: dict[str, Process] = field(default_factory=dict)
    made: list[Process] = field(default_factory=list)
    dialled: int = 0

    @property
    def hatch(self) -> HatchAddress:
        return hatch_of(self.node)

    @property
    def python(self) -> str:
        return "/there/python"

    def processes(self) -> Mapping[str, Process]:
        return {name: one for name, one in self.held.items() if not one.ended.done()}

    async def start(
        self, name: str, argv: Sequence[str], stdin_line: str, *, grace_s: float, stamp: str
    ) -> Process:
        if not self.up:
            raise ConnectionError(f"node {self.node} is lost")
        assert list(argv[:2]) == ["/there/python", "-m"]
        assert name not in self.processes()
        process = Process(len(self.made) + 1, stamp, stdin_line, works=self.works)
        self.made.append(process)
        self.held[name] = process
        return process

    async def failure(self, name: str, process: KeptProcess) -> str:
        del process
        return f"cannot listen; see {name}.log"

    def lose(self) -> None:
        """Its cable is pulled."""
        self.up = False
        for process in self.held.values():
            if not process.lost.done():
                process.lost.set_exception(ConnectionError(f"node {self.node} is lost: silent"))
                process.lost.exception()

    def find(self) -> None:
        """It is back, with all that ran there."""
        self.up = True
        for process in self.held.values():
            process.lost = asyncio.get_running_loop().create_future()

    async def dial(self, name: str) -> HubStreams:
        assert known_name(name)
        self.dialled += 1
        if not self.up:
            raise ConnectionError("no way there")
        return await asyncio.open_unix_connection(str(self.folder / name))


class Records(list[RequestRecord]):
    def put(self, one: RequestRecord) -> bool:
        self.append(one)
        return True

    def close(self) -> None:
        pass


class World:
    def __init__(self, folder: Path) -> None:
        self.clock = VirtualClock()
        self.records = Records()
        self.hub = Hub(self._operate, self.records)
        self.hub.publish(TABLE, ClusterSnapshot())
        self.nodes = {name: Node(name, folder / name) for name in ("a", "b")}
        for node in self.nodes.values():
            node.folder.mkdir()
        self.gateways = self.make()
        self._moving = asyncio.create_task(self._move())

    def make(self, plan: GatewayPlan = PLAN) -> NodeGateways:
        return NodeGateways(self.hub, plan, self.clock, self._dial)

    async def _operate(self, call: OperatorCall) -> OperatorAnswer:
        return OperatorAnswer(status=409, body=call.path.encode())

    async def _dial(self, hatch: HatchAddress, name: str) -> HubStreams:
        return await self.nodes[hatch.certificate.split()[-1]].dial(name)

    async def _move(self) -> None:
        """Time passes."""
        while True:
            await self.clock.advance(0.1)
            await asyncio.sleep(0.001)

    def follow(self, *leaving: str) -> None:
        up = {name: node for name, node in self.nodes.items() if node.up}
        self.gateways.follow(up, leaving)

    def states(self) -> dict[str, str]:
        return {one.node: one.state.value for one in self.gateways.status()}

    async def close(self) -> None:
        await self.gateways.close()
        self._moving.cancel()
        for node in self.nodes.values():
            for process in node.made:
                await process.close()


@pytest.fixture
async def world() -> AsyncIterator[World]:
    with tempfile.TemporaryDirectory() as folder:
        made = World(Path(folder))
        yield made
        await made.close()


async def test_each_node_has_one_that_knows_the_table_and_the_others(world: World) -> None:
    world.hub.publish(replace(TABLE, replicas=(replica("r", "a"),)), ClusterSnapshot())
    world.follow()
    await until(lambda: set(world.states().values()) == {"serving"})
    here, there = world.nodes["a"].made[0], world.nodes["b"].made[0]
    for process in (here, there):
        await until(lambda process=process: process.runner.table.plan_id == "p")  # type: ignore[misc]
        await until(lambda process=process: process.runner.snapshot.processes == 2)  # type: ignore[misc]
    # One reaches the engine of its own node through its socket, the other through the hatch.
    endpoint = here.runner.table.replicas[0].endpoint
    assert endpoint == Endpoint(unix_socket=str(world.nodes["a"].folder / "r-1/api.sock"))
    assert there.runner.table.replicas[0].endpoint.hatch == hatch_of("a")
    # What both count reaches the server.
    arrived_s = time.time()
    for process in (here, there):
        process.runner.estimator.tally.arrived(arrived_s, (1.0,))
        process.outbox.put(
            RequestRecord(
                arrival_s=arrived_s,
                prompt_tokens=1,
                output_tokens=1,
                workload_type="all",
                replica="r",
                ttft_s=None,
                tpot_s=None,
                e2e_s=1.0,
                status=FinishStatus.COMPLETED,
            )
        )
    await until(lambda: len(world.records) == 2 and here.outbox.empty and there.outbox.empty)
    counted: list[float] = []
    while sum(counted) < 2:
        counted += [row[0] for one in world.hub.batches() for row in one.arrivals.values()]
        await asyncio.sleep(0.001)
    assert sum(counted) == 2
    assert await here.client.operate("/oserve/v1/nodes", b"") == (409, b"/oserve/v1/nodes")


async def test_one_that_dies_is_started_again_and_the_others_go_on(world: World) -> None:
    world.follow()
    await until(lambda: set(world.states().values()) == {"serving"})
    first, other = world.nodes["a"].made[0], world.nodes["b"].made[0]
    first.runner.metrics.count("oserve_requests", "completed")
    await first.client.sync()
    await first.close()
    await until(lambda: len(world.nodes["a"].made) == 2 and world.states()["a"] == "serving")
    assert world.nodes["b"].made == [other]
    # What it had counted stays in the sums.
    await other.client.sync()
    assert other.runner.snapshot.metrics["oserve_requests"] == {"completed": [1.0]}


async def test_a_fault_in_one_answer_is_no_end_of_the_calls(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    world.follow()
    await until(lambda: set(world.states().values()) == {"serving"})
    node, reply, faults = world.nodes["a"], world.hub.reply, [RuntimeError("unforeseen")]
    before = node.dialled

    def faulty(report: WorkerReport, node: str = "") -> HubReply:
        if faults and node == "a":
            raise faults.pop()
        return reply(report, node)

    monkeypatch.setattr(world.hub, "reply", faulty)
    await until(lambda: node.dialled > before)
    assert "a gateway process of node a could not be answered" in caplog.text
    (process,) = node.made
    world.hub.publish(replace(TABLE, plan_id="next"), ClusterSnapshot())
    await until(lambda: process.runner.table.plan_id == "next")


async def test_an_operator_s_call_that_fails_is_answered(world: World) -> None:
    async def fails(_call: OperatorCall) -> OperatorAnswer:
        raise RuntimeError("unforeseen")

    hub = Hub(fails)
    answer = await hub.operated(OperatorCall(path="/oserve/v1/nodes", body=b""))
    assert (answer.status, b"RuntimeError" in answer.body) == (500, True)


async def test_one_that_cannot_start_is_told_of_and_tried_again(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.nodes["a"].works = False
    world.follow()
    await until(lambda: len(world.nodes["a"].made) >= 4)
    (told,) = [one for one in world.gateways.status() if one.node == "a"]
    assert told.state == "failing"
    assert "cannot listen; see gateway:0.log" in told.reason
    assert sum("gateway 0 of node a" in line for line in caplog.messages) == 1
    world.nodes["a"].works = True
    await until(lambda: world.states()["a"] == "serving")


async def test_a_node_that_is_cut_off_finds_its_gateway_again(world: World) -> None:
    world.follow()
    await until(lambda: set(world.states().values()) == {"serving"})
    node = world.nodes["a"]
    node.lose()
    await until(lambda: world.states()["a"] == "away")
    world.follow()
    assert world.states()["b"] == "serving"
    node.find()
    world.follow()
    await until(lambda: world.states()["a"] == "serving")
    assert len(node.made) == 1
    # It loses power, and is back without anything.
    gone = node.made[0]
    node.lose()
    await until(lambda: world.states()["a"] == "away")
    await gone.close()
    node.held.clear()
    node.find()
    world.follow()
    await until(lambda: len(node.made) == 2 and world.states()["a"] == "serving")
    assert world.hub.view(gone.config.incarnation) is None


async def test_the_next_server_takes_over_what_fits_and_ends_the_rest(world: World) -> None:
    world.follow()
    await until(lambda: set(world.states().values()) == {"serving"})
    before = {name: node.made[0] for name, node in world.nodes.items()}
    world.hub = Hub(world._operate, world.records)
    world.hub.publish(replace(TABLE, plan_id="q"), ClusterSnapshot())
    first, world.gateways = world.gateways, world.make()
    world.follow()
    await until(lambda: set(world.states().values()) == {"serving"})
    assert {name: node.made for name, node in world.nodes.items()} == {
        name: [process] for name, process in before.items()
    }
    await until(lambda: before["a"].runner.table.plan_id == "q")
    # With other keys they are started anew; without the setting they are ended.
    for plan, count in ((replace(PLAN, keys=frozenset({"l"})), 1), (replace(PLAN, count=0), 0)):
        world.gateways = world.make(plan)
        world.follow()
        await until(lambda: all(len(node.processes()) == count for node in world.nodes.values()))  # noqa: B023
        await until(lambda: "serving" in world.states().values() or not world.states())
    assert all(process.ended.done() for process in before.values())
    del first


async def test_a_node_that_is_drained_has_its_gateway_end_until_it_is_used_again(
    world: World,
) -> None:
    world.follow()
    await until(lambda: set(world.states().values()) == {"serving"})
    world.follow("a")
    await until(lambda: not world.nodes["a"].processes())
    world.follow("a")
    await asyncio.sleep(0)
    assert world.states() == {"a": "leaving", "b": "serving"}
    await until(lambda: len(world.nodes["b"].processes()) == 1)

    def back() -> bool:
        world.follow()
        return world.states()["a"] == "serving"

    await until(back)
    assert len(world.nodes["a"].made) == 2


async def test_a_call_that_breaks_is_made_again_and_nothing_is_lost(world: World) -> None:
    world.follow()
    await until(lambda: set(world.states().values()) == {"serving"})
    process, node = world.nodes["a"].made[0], world.nodes["a"]
    for number in range(5):
        process.runner.estimator.tally.arrived(time.time(), (1.0,))
        dialled = node.dialled
        writer = process.hub._writer
        assert writer is not None
        if number % 2:
            writer.transport.abort()
        else:
            writer.write(b"no number\n")
        await until(lambda: node.dialled > dialled)  # noqa: B023
        await until(lambda: process.hub._writer is not None)
    counted: list[float] = []

    def all_counted() -> bool:
        batches = world.hub.batches()
        counted.extend(row[0] for one in batches for row in one.arrivals.values())
        return sum(counted) >= 5

    await until(all_counted)
    assert sum(counted) == 5
    assert world.states()["a"] == "serving"


async def test_a_call_that_has_just_broken_is_no_way_to_the_hub(tmp_path: Path) -> None:
    line = CalledLine()
    await line.listen(str(tmp_path / "s"))
    _, writer = await asyncio.open_unix_connection(str(tmp_path / "s"))
    try:
        await until(lambda: line._writer is not None)
        assert line._writer is not None
        # Before anything can be read of it: uvloop refuses to write there.
        line._writer.transport.abort()
        await asyncio.sleep(0)
        with pytest.raises(ConnectionError):
            await line.ask(b"{}", 1.0)
    finally:
        writer.transport.abort()
        await line.close()


async def test_a_process_that_nobody_calls_knows_it() -> None:
    line = CalledLine()
    client = HubClient(line, RequestRunner(GatewaySettings(), None), 1)
    with pytest.raises(ConnectionError, match="has not called"):
        await client.sync()


def test_only_engines_of_the_same_node_are_reached_directly() -> None:
    home = GatewayHome(node="a", folder="/f", certificate=hatch_of("a").certificate, alone_s=1.0)
    table = replace(TABLE, replicas=(replica("r", "a"), replica("s", "b")))
    assert localised(table, None) is table
    mine, other = localised(table, home).replicas
    assert mine.endpoint == Endpoint(unix_socket="/f/r-1/api.sock")
    assert other == table.replicas[1]
    # Addresses of a node change, its certificate does not.
    moved = replace(
        replica("r", "a"),
        endpoint=Endpoint(unix_socket="x/api.sock", hatch=replace(hatch_of("a"), host="elsewhere")),
    )
    assert localised(replace(TABLE, replicas=(moved,)), home).replicas[0].endpoint.hatch is None
