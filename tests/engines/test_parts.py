"""Parts of one engine end together, whatever happens to one of them, and the first is blamed."""

import asyncio
import signal
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oserve.control.progress import Activity
from oserve.core import Device, OServeError, ReplicaPart, ReplicaShape, ReplicaSpec, parts_of
from oserve.engines.held_process import NodeLostError
from oserve.engines.parts import TiedParts, joint_activity
from oserve.engines.parts_process import PartEndedError, PartsProcess, start_parts
from oserve.engines.ports import MASTER_PORTS, MasterPorts

KILLED = -signal.SIGKILL


def parts(count: int) -> tuple[ReplicaPart, ...]:
    devices = {f"d{i}": Device(id=f"d{i}", kind="cpu", node=f"n{i}") for i in range(count)}
    shape = ReplicaShape(pipeline_parallel_size=count)
    return parts_of(ReplicaSpec(id="r", shape=shape, devices=tuple(devices)), devices)


events = st.tuples(
    st.sampled_from(["ended", "silent", "terminate", "kill"]),
    st.integers(0, 2),
    st.integers(-9, 3),
)


@given(st.lists(events, max_size=12))
def test_whatever_happens_all_end_once_one_has(happened: list[tuple[str, int, int]]) -> None:
    tied = TiedParts(parts(3))
    gone: dict[int, str] = {}
    killed: set[int] = set()
    asked = False
    first: tuple[int, str, bool] | None = None
    for what, index, status in happened:
        match what:
            case "ended":
                orders = tied.ended(index, status)
            case "silent":
                orders = tied.silent(index, "is silent", status)
            case _:
                orders = tied.asked(kill=what == "kill")
                asked = True
                assert {order.index for order in orders} == {0, 1, 2} - set(gone)
                assert {order.kill for order in orders} <= {what == "kill"}
                continue
        if index in gone:
            assert orders == ()
            continue
        gone[index] = what
        first = first or (index, what, asked)
        others = {0, 1, 2} - set(gone)
        # Killed at once; what may be alive out of reach is told too, should it hear it.
        assert all(order.kill for order in orders)
        assert {order.index for order in orders} <= others | (
            {index} if what == "silent" else set()
        )
        killed |= {order.index for order in orders}
        assert killed >= others
    assert tied.is_over == (len(gone) == 3)
    assert (tied.status is None) == (first is None)
    if first is not None:
        index, _, told = first
        named = tied.reason.startswith(f"part {index + 1} of 3 (node n{index}, rank {index}) ")
        assert named == (not told)
        assert bool(tied.reason) == (not told)


def test_the_log_of_the_first_names_the_cause() -> None:
    tied = TiedParts(parts(2))
    tied.ended(1, 1, "RuntimeError: no memory")
    tied.ended(0, KILLED)
    assert tied.status == 1
    assert tied.reason == (
        "part 2 of 2 (node n1, rank 1) ended with status 1: RuntimeError: no memory"
    )


def test_activity_is_that_of_all_parts() -> None:
    one = Activity(stopped=1, work_s=1.0, moved=3)
    other = Activity(blocked=True, work_s=0.5, moved=4)
    assert joint_activity([one, other]) == Activity(stopped=1, blocked=True, work_s=1.5, moved=7)
    assert joint_activity([one, None]) is None
    assert joint_activity([]) is None


class FakePart:
    """A process of one part; ``deaf``: signals do not reach it."""

    def __init__(self, pid: int, *, deaf: bool = False) -> None:
        self.pid = pid
        self.deaf = deaf
        self.told = ""
        self.busy: Activity | None = Activity(work_s=1.0)
        self.signals: list[str] = []
        self._ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def wait(self) -> int:
        return await asyncio.shield(self._ended)

    async def cause(self) -> str:
        return self.told

    async def activity(self) -> Activity | None:
        return self.busy

    def terminate(self) -> None:
        self.signals.append("TERM")

    def kill(self) -> None:
        self.signals.append("KILL")
        if not self.deaf:
            self.end(KILLED)

    def end(self, status: int) -> None:
        if not self._ended.done():
            self._ended.set_result(status)

    def lose(self) -> None:
        if not self._ended.done():
            self._ended.set_exception(NodeLostError("node n1 is silent for 5 s"))


def starter(
    processes: list[FakePart], fails: int | None = None, error: Exception | None = None
) -> Callable[[ReplicaPart], Awaitable[FakePart]]:
    async def start(part: ReplicaPart) -> FakePart:
        if part.index == fails:
            raise error or OServeError("no such model", place="engines", remedy="copy it")
        processes.append(FakePart(100 + part.index))
        return processes[-1]

    return start


async def running(count: int = 2) -> tuple[PartsProcess, list[FakePart]]:
    processes: list[FakePart] = []
    return await start_parts(parts(count), starter(processes)), processes


@pytest.mark.parametrize("victim", [0, 1, 2])
async def test_one_ends_and_so_do_the_others(victim: int) -> None:
    whole, processes = await running(3)
    assert whole.pid == 100
    processes[victim].told = "it broke"
    processes[victim].end(7)
    with pytest.raises(PartEndedError) as told:
        await whole.wait()
    assert str(told.value) == (
        f"part {victim + 1} of 3 (node n{victim}, rank {victim}) ended with status 7: it broke"
    )
    assert [one.signals for index, one in enumerate(processes) if index != victim] == [["KILL"]] * 2


async def test_told_to_end_it_blames_nobody() -> None:
    whole, processes = await running()
    whole.terminate()
    assert [one.signals for one in processes] == [["TERM"], ["TERM"]]
    processes[0].end(0)
    assert await whole.wait() == 0
    # Without the leader nobody needs the workers, which would take their time.
    assert processes[1].signals == ["TERM", "KILL"]
    whole.kill()


async def test_a_part_out_of_reach_is_not_waited_for() -> None:
    whole, processes = await running()
    processes[1].deaf = True
    processes[1].lose()
    with pytest.raises(NodeLostError) as told:
        await whole.wait()
    assert told.value.message == (
        "part 2 of 2 (node n1, rank 1) is out of reach: node n1 is silent for 5 s"
    )
    assert [one.signals for one in processes] == [["KILL"], ["KILL"]]


async def test_causes_and_activity_are_those_of_all_parts() -> None:
    whole, processes = await running()
    assert await whole.cause() == ""
    processes[1].told = "RuntimeError: no memory"
    assert await whole.cause() == "part 2 of 2 (node n1, rank 1): RuntimeError: no memory"
    assert await whole.activity() == Activity(work_s=2.0)
    processes[0].busy = None
    assert await whole.activity() is None
    whole.kill()
    assert await whole.wait() == KILLED


@pytest.mark.parametrize("fails", [0, 1])
@pytest.mark.parametrize("error", [None, OSError("no line to the keeper")])
async def test_a_part_that_cannot_start_leaves_none(fails: int, error: Exception | None) -> None:
    processes: list[FakePart] = []
    with pytest.raises(OServeError, match=rf"part {fails + 1} of 2 \(node n{fails}, rank") as told:
        await start_parts(parts(2), starter(processes, fails, error))
    assert str(error or "no such model") in told.value.message
    assert [one.signals for one in processes] == [["KILL"]] * len(processes)


async def test_a_cancelled_start_leaves_none() -> None:
    processes: list[FakePart] = []
    begin = starter(processes)

    async def start(part: ReplicaPart) -> FakePart:
        if part.index == 1:
            await asyncio.Event().wait()
        return await begin(part)

    starting = asyncio.ensure_future(start_parts(parts(2), start))
    for _ in range(3):
        await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert [one.signals for one in processes] == [["KILL"]]


def test_ports_take_turns_on_each_address() -> None:
    ports = MasterPorts(range(5, 8), first=1)
    assert [ports.take("a") for _ in range(4)] == [6, 7, 5, 6]
    assert ports.take("b") == 6
    assert MasterPorts().take("a") in MASTER_PORTS
