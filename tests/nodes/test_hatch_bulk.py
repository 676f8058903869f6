"""Weights from node to node: ranks, two hatches, and what ends whom."""

import asyncio
import contextlib
import hashlib
import mmap
import os
import random
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hatches import LIMIT_S, RunningHatch, opened, running_hatch
from oserve.engines.weights.relay_orders import SEND, TAKE, FileRange, Order
from oserve.engines.weights.sockets import (
    Listener,
    ShardStream,
    Throttle,
    TransferError,
    far_address,
)
from oserve.nodes.hatch_blocking import dial_hatch
from oserve.nodes.hatch_messages import HatchLimits, HatchReport, ReportQuery, ask_hatch
from oserve.wire.hatch import HatchError, HatchRefusedError

FREE = Throttle(0.0, threading.Event())


@pytest.fixture
async def nodes(tmp_path: Path) -> AsyncIterator[tuple[RunningHatch, RunningHatch]]:
    """Two, of which the first knows the second as ``b``."""
    async with running_hatch(tmp_path) as a, running_hatch(tmp_path) as b:
        a.knows(b=b)
        yield a, b


def deadline_s() -> float:
    return time.monotonic() + LIMIT_S


async def aside(work: Callable[..., Any], *arguments: Any) -> Any:
    return await asyncio.to_thread(work, *arguments)


async def test_a_rank_sends_to_another_node_as_to_its_own(
    nodes: tuple[RunningHatch, RunningHatch],
) -> None:
    a, b = nodes
    address = far_address("b", "e-1/w0.sock", a.out)
    data = bytes(range(256)) * 30_000

    def send() -> ShardStream:
        # Before the other listens, as happens in a transfer.
        stream = ShardStream.call(address, "t", 3, deadline_s())
        stream.send(7, memoryview(data), FREE)
        assert stream.take(4) == b"done"
        return stream

    sending = asyncio.ensure_future(aside(send))
    listener = Listener(str(b.listener("e-1/w0.sock")))
    called = (await aside(listener.accept, "t", [3], deadline_s()))[3]
    got = bytearray(len(data))
    await aside(called.receive, 7, memoryview(got))
    assert got == data
    called.give(memoryview(b"done"))
    stream = await sending
    assert stream.far
    assert not called.far
    stream.close()
    with pytest.raises(TransferError, match="closed the connection"):
        await aside(called.take, 1)
    called.close()
    listener.close()
    # The bytes of the link are told, by the node that opened it.
    async with asyncio.timeout(LIMIT_S):
        while True:
            report = await ask_hatch(a.address, ReportQuery(), timeout_s=LIMIT_S)
            assert isinstance(report, HatchReport)
            if report.received_bytes == {"b": 4} and report.sent_bytes["b"] > len(data):
                break


async def test_all_that_a_rank_sent_before_it_closed_arrives(
    nodes: tuple[RunningHatch, RunningHatch],
) -> None:
    a, b = nodes
    with socket.socket(socket.AF_UNIX) as taker:
        taker.bind(str(b.listener("e-1/w1.sock")))
        taker.listen()
        data = bytes(range(256)) * 50_000

        def send() -> None:
            with socket.socket(socket.AF_UNIX) as giver:
                giver.connect(a.out)
                giver.sendall(b"b e-1/w1.sock\n")
                assert giver.recv(100) == b"ok\n"
                giver.sendall(data)

        def take() -> str:
            connection, _ = taker.accept()
            with connection:
                found = hashlib.sha256()
                while piece := connection.recv(1 << 20):
                    found.update(piece)
            return found.hexdigest()

        _, found = await asyncio.gather(aside(send), aside(take))
        assert found == hashlib.sha256(data).hexdigest()


async def test_both_ways_at_once_block_neither(nodes: tuple[RunningHatch, RunningHatch]) -> None:
    a, _ = nodes
    data = bytes(range(256)) * 40_000
    with socket.socket(socket.AF_UNIX) as rank:
        rank.connect(a.out)
        rank.sendall(b"b echo\n")
        assert await aside(rank.recv, 100) == b"ok\n"
        sending = asyncio.ensure_future(aside(rank.sendall, data))
        got = await aside(rank.recv, len(data), socket.MSG_WAITALL)
        await sending
        assert got == data


async def test_what_cannot_be_relayed_is_said(nodes: tuple[RunningHatch, RunningHatch]) -> None:
    a, b = nodes
    said = {
        b"c e-1/w0.sock\n": "does not know the node c",
        b"b e-1/w9.sock\n": "nothing listens there",
        b"b keeper.sock\n": "cannot be read",
        b"b e-1/api.sock\n": "cannot be read",
        b"b ../w0.sock\n": "cannot be read",
        b"nonsense\n": "cannot be read",
        b"x" * 600: "too long",
    }
    for line, reason in said.items():
        with socket.socket(socket.AF_UNIX) as rank:
            rank.connect(a.out)
            rank.sendall(line)
            answer = await aside(rank.recv, 1000)
        assert answer.startswith(b"no ")
        assert reason in answer.decode(), line
    late = far_address("b", "e-1/w9.sock", a.out)
    with pytest.raises(TransferError, match="nothing listens there"):
        await aside(ShardStream.call, late, "t", 0, time.monotonic() + 1.0)
    del b


async def test_the_bulk_entrance_asks_for_the_token_too(tmp_path: Path) -> None:
    async with running_hatch(tmp_path, HatchLimits(answer_s=0.3)) as hatch:
        stranger = replace(hatch.address, token="not it")
        with pytest.raises(HatchError, match="does not know the token"):
            await aside(lambda: dial_hatch(stranger, "echo", timeout_s=LIMIT_S))
        with pytest.raises(HatchRefusedError, match="no such name"):
            await aside(lambda: dial_hatch(hatch.address, "e/api.sock", timeout_s=LIMIT_S))
        reader, writer = await asyncio.open_connection("127.0.0.1", hatch.address.port)
        writer.write(b"B")
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
        writer.close()
        async with asyncio.timeout(LIMIT_S):
            while sum(hatch.hatch._admission.refused.values()) < 3:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert set(hatch.hatch._admission.refused) == {
            "wrong token, or a line of another connection",
            "there is no such name",
            "it left, or was silent",
        }


async def test_a_rank_that_dies_ends_the_other(nodes: tuple[RunningHatch, RunningHatch]) -> None:
    a, b = nodes
    listener = Listener(str(b.listener("e-1/w0.sock")))
    address = far_address("b", "e-1/w0.sock", a.out)
    for dying in (0, 1):
        stream, called = await asyncio.gather(
            aside(ShardStream.call, address, "t", 3, deadline_s()),
            aside(listener.accept, "t", [3], deadline_s()),
        )
        ends = (stream, called[3])
        ends[dying].close()
        with pytest.raises(TransferError):
            await aside(ends[1 - dying].take, 1)
        ends[1 - dying].close()
    listener.close()


async def test_streams_of_weights_are_bounded(tmp_path: Path) -> None:
    limits = HatchLimits(bulk_connections=1, answer_s=LIMIT_S)
    async with running_hatch(tmp_path, limits) as hatch:
        held = await aside(lambda: dial_hatch(hatch.address, "echo", timeout_s=LIMIT_S))
        with pytest.raises(HatchError):
            await aside(lambda: dial_hatch(hatch.address, "echo", timeout_s=LIMIT_S))
        # Streams of tokens do not wait for those of weights.
        _, writer = await opened(hatch.address, "echo")
        writer.close()
        held.close()


async def connected(a: RunningHatch, b: RunningHatch) -> tuple[ShardStream, ShardStream]:
    """A stream from a rank on one node to one on the other."""
    listener = Listener(str(b.listener("e-1/w0.sock")))
    address = far_address("b", "e-1/w0.sock", a.out)
    stream, called = await asyncio.gather(
        aside(ShardStream.call, address, "t", 3, deadline_s()),
        aside(listener.accept, "t", [3], deadline_s()),
    )
    listener.close()
    return stream, called[3]


@contextlib.contextmanager
def in_file(data: bytes) -> Iterator[tuple[int, mmap.mmap]]:
    """A file without a name that holds these bytes, and its memory."""
    descriptor = os.memfd_create("weights")
    try:
        os.write(descriptor, data)
        with mmap.mmap(descriptor, len(data)) as memory:
            yield descriptor, memory
    finally:
        os.close(descriptor)


def bytes_in(memory: mmap.mmap, place: FileRange) -> bytes:
    starts = range(place.offset, place.end, place.stride)
    return b"".join(memory[start : start + place.row_bytes] for start in starts)


async def test_hatches_read_and_write_the_memory_of_ranks(
    nodes: tuple[RunningHatch, RunningHatch],
) -> None:
    stream, called = await connected(*nodes)
    pattern = random.Random(0).randbytes(3_000_000)
    # One piece, short rows, long rows; in other forms at the other end, and some by the socket.
    sources: list[FileRange | bytes] = [
        FileRange(7, 1_000_000, 1_000_000, 1),
        FileRange(11, 300, 700, 4000),
        FileRange(0, 40_000, 70_000, 40),
        b"small",
        pattern[:600_000],
        FileRange(2_999_999, 1, 1, 1),
    ]
    targets: list[FileRange | int] = [
        FileRange(0, 1000, 2000, 1000),
        FileRange(1000, 1000, 2000, 1200),
        1_600_000,
        5,
        FileRange(2_400_000, 600_000, 600_000, 1),
        1,
    ]
    with in_file(pattern) as (sent, memory), in_file(bytes(3_000_000)) as (got, target):

        def send() -> None:
            stream.take(1)
            for number, source in enumerate(sources):
                if isinstance(source, bytes):
                    stream.send(number, memoryview(source), FREE)
                else:
                    stream.order_send(number, sent, source, FREE)
            stream.give_head(len(sources), 0)
            stream.take(1)

        def receive() -> list[bytes]:
            called.order_take(got, targets)
            called.give(memoryview(b"1"))
            found = []
            for number, place in enumerate(targets):
                if isinstance(place, int):
                    data = bytearray(place)
                    called.receive(number, memoryview(data))
                    found.append(bytes(data))
                else:
                    called.take_head(number, place.size)
                    found.append(b"")
            called.take_head(len(targets), 0)
            called.give(memoryview(b"1"))
            return found

        _, found = await asyncio.gather(aside(send), aside(receive))
        for source, place, came in zip(sources, targets, found, strict=True):
            expected = source if isinstance(source, bytes) else bytes_in(memory, source)
            assert (came if isinstance(place, int) else bytes_in(target, place)) == expected
    stream.close()
    called.close()


@pytest.mark.parametrize(
    "order",
    [
        Order(SEND, [FileRange(90, 20, 20, 1)]),
        Order(SEND, [FileRange(0, 10, 30, 5)]),
        Order(TAKE, [FileRange(1 << 62, 20, 20, 1)]),
    ],
)
async def test_no_order_leads_out_of_its_file(
    nodes: tuple[RunningHatch, RunningHatch], order: Order
) -> None:
    stream, called = await connected(*nodes)
    with in_file(bytes(100)) as (descriptor, _):
        stream.give_descriptor(descriptor)
        stream.give(memoryview(order.encode()))
        with pytest.raises(TransferError):
            await aside(called.take, 1)
    stream.close()
    called.close()


@pytest.mark.extra
@pytest.mark.parametrize("held", [(True, True), (True, False), (False, True), (False, False)])
async def test_memory_goes_from_node_to_node(
    nodes: tuple[RunningHatch, RunningHatch], held: tuple[bool, bool]
) -> None:
    torch = pytest.importorskip("torch")
    from oserve.engines.weights import parts  # noqa: PLC0415
    from oserve.engines.weights.jobs import ByteCounter  # noqa: PLC0415
    from oserve.engines.weights.memory import WeightMemory  # noqa: PLC0415
    from oserve.switch.rank_order import ShardPart  # noqa: PLC0415

    stream, called = await connected(*nodes)
    torch.manual_seed(0)

    def rank(make: Any, inside: bool, *shapes: tuple[int, ...]) -> tuple[dict[str, Any], Any]:
        own = [torch.nn.Parameter(make(*shape)) for shape in shapes]
        memory = WeightMemory(own) if inside else None
        return {f"w{n}": one.data for n, one in enumerate(own)}, memory

    source, shown = rank(torch.randn, held[0], (64, 48), (100,), (4, 32, 6))
    target, placed = rank(torch.zeros, held[1], (64, 24), (100,), (4, 16, 3))
    sends = [
        ShardPart("w0", ((0, 64), (24, 48))),
        ShardPart("w1", ((0, 100),)),
        ShardPart("w2", ((0, 4), (8, 24), (0, 3))),
    ]
    receives = [
        ShardPart(name, tuple((0, size) for size in one.shape)) for name, one in target.items()
    ]
    limits = parts.CopyLimits(throttle=FREE, deadline_s=deadline_s(), stopped=threading.Event())
    sent, received = ByteCounter(), ByteCounter()
    await asyncio.gather(
        aside(parts.send_parts, stream, sends, source, shown, FREE, sent),
        aside(parts.receive_parts, called, receives, target, placed, limits, received),
    )
    assert torch.equal(target["w0"], source["w0"][:, 24:])
    assert torch.equal(target["w1"], source["w1"])
    assert torch.equal(target["w2"], source["w2"][:, 8:24, :3])
    assert sent.total == received.total == sum(one.nbytes for one in target.values())
    for one in (stream, called):
        one.close()
