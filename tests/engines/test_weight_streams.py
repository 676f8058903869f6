"""Weights between ranks: what arrives, how it is converted, and how a failed transfer ends."""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from oserve.engines.rank_commands import COMMANDS, JobReport, MoveShards
from oserve.engines.weights.sockets import (
    Listener,
    ShardStream,
    Throttle,
    TransferError,
    addresses_from,
)

FREE = threading.Event()


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[Listener]:
    listener = Listener(str(tmp_path / "w0.sock"))
    yield listener
    listener.close()


Pair = Callable[..., tuple[ShardStream, ShardStream]]


@pytest.fixture
def pair(listener: Listener) -> Iterator[Pair]:
    """Makes both ends of a stream; all of them are closed afterwards."""
    with contextlib.ExitStack() as opened:

        def made(limit_s: float = 20.0) -> tuple[ShardStream, ShardStream]:
            deadline_s = time.monotonic() + limit_s
            caller = ShardStream.call(listener.path, "t", 3, deadline_s)
            opened.callback(caller.close)
            called = listener.accept("t", [3], deadline_s)[3]
            opened.callback(called.close)
            return caller, called

        yield made


def test_bytes_go_through_whatever_the_pace(pair: Pair) -> None:
    data = bytes(range(256)) * 40_000
    for pace in (0.0, 1e9):
        caller, called = pair()
        got = bytearray(len(data))
        sending = threading.Thread(
            target=caller.send, args=(7, memoryview(data), Throttle(pace, FREE))
        )
        sending.start()
        called.receive(7, memoryview(got))
        sending.join()
        assert got == data


def test_other_transfers_and_wrong_order_are_refused(listener: Listener, pair: Pair) -> None:
    deadline_s = time.monotonic() + 20
    with contextlib.closing(ShardStream.call(listener.path, "other", 3, deadline_s)) as stranger:
        caller, called = pair()
        with pytest.raises(TransferError):
            stranger.take(1)
    caller.send(0, memoryview(b"abc"), Throttle(0, FREE))
    with pytest.raises(TransferError, match="part 0 of 3 bytes"):
        called.receive(1, memoryview(bytearray(3)))


def test_a_caller_that_leaves_before_its_name_is_whole_keeps_nothing_open(
    listener: Listener,
) -> None:
    with socket.socket(socket.AF_UNIX) as caller:
        caller.connect(listener.path)
        caller.send(b"\0\0")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(TransferError, match="closed the connection"):
        listener.accept("t", [3], time.monotonic() + 20)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_peer_that_ends_or_is_silent(listener: Listener, pair: Pair) -> None:
    caller, called = pair(limit_s=0.2)
    with pytest.raises(TransferError):
        called.take(1)
    caller, called = pair()
    caller.close()
    with pytest.raises(TransferError, match="closed the connection"):
        called.take(1)
    with pytest.raises(TransferError, match="rank 5 did not connect"):
        listener.accept("t", [5], time.monotonic() + 0.05)
    with pytest.raises(TransferError, match="no rank listens"):
        ShardStream.call(listener.path + "x", "t", 0, time.monotonic() + 0.05)


def test_ranks_of_other_nodes_are_called_through_the_own_hatch() -> None:
    paths = ["/a/run/e-1/w0.sock", "/b/run/f-2/w0.sock", "/b/run/f-2/w1.sock"]
    assert addresses_from(0, paths, ["x", "y", "y"]) == [
        paths[0],
        "y:f-2/w0.sock@/a/run/out.sock",
        "y:f-2/w1.sock@/a/run/out.sock",
    ]
    assert addresses_from(2, paths, ["x", "y", "y"])[0] == "x:e-1/w0.sock@/b/run/out.sock"
    assert addresses_from(1, paths, [""] * 3) == paths


def test_closing_wakes_a_waiting_thread(pair: Pair) -> None:
    _, called = pair()
    failed: list[Exception] = []

    def wait() -> None:
        try:
            called.take(1)
        except TransferError as error:
            failed.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    called.close()
    waiting.join(timeout=20)
    assert len(failed) == 1


class Ranks:
    """Transfers of several ranks in one process; ``memories``: of ranks, where others can map."""

    def __init__(
        self, folder: Path, tensors: list[dict[str, Any]], memories: dict[int, Any] | None = None
    ) -> None:
        self.tensors = tensors
        self.memories = memories or {}
        self.paths = [str(folder / f"w{number}.sock") for number in range(len(tensors))]
        self.listeners = [Listener(path) for path in self.paths]

    def run(self, orders: list[dict[str, Any]], limit_s: float = 20.0) -> list[Any]:
        from oserve.engines.weights.transfer import Transfer  # noqa: PLC0415

        jobs = [
            Transfer(
                command_of(n, self.paths, limit_s, own),
                self.tensors[n],
                self.listeners[n],
                self.memories.get(n),
            )
            for n, own in enumerate(orders)
        ]
        for job in jobs:
            job.start()
        self.jobs = jobs
        return jobs

    def wait(self) -> list[JobReport]:
        while any(job.state == "running" for job in self.jobs):
            time.sleep(0.01)
        return [job.report() for job in self.jobs]


def command_of(
    number: int, addresses: list[str], limit_s: float, fields: dict[str, Any]
) -> MoveShards:
    """The command with these fields of an order, as the rank reads it."""
    own = dict(fields)
    command = {"bytes_per_s": own.pop("bytes_per_s", 0.0)}
    for way in ("sends", "receives"):
        own[way] = {str(peer): parts for peer, parts in own.get(way, [])}
    own |= {"replica": "r", "rank": number}
    command |= {"type": "MoveShards", "name": "t", "number": number, "addresses": addresses}
    text = msgspec.json.encode({**command, "limit_s": limit_s, "order": own}).decode()
    read = COMMANDS.decode(text)
    assert isinstance(read, MoveShards)
    return read


@pytest.mark.extra
def test_rows_shared_by_ranks_are_quantised_alike(tmp_path: Path) -> None:
    """int8 made by two ranks that hold half of each row is that of the whole matrix."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    weight = torch.randn(8, 12, dtype=torch.bfloat16)
    weight[3] = 0
    norm = torch.randn(5)
    source = {"o.weight": weight, "norm": norm}
    targets = [
        {
            "o.weight": torch.zeros(8, 6, dtype=torch.int8),
            "o.weight_scale": torch.zeros(8, 1),
            "norm": torch.zeros(5, dtype=torch.bfloat16),
        }
        for _ in range(2)
    ]
    ranks = Ranks(tmp_path, [source, *targets])
    parts = [[("o.weight", [[0, 8], [6 * n, 6 * n + 6]]), ("norm", [[0, 5]])] for n in range(2)]
    own = [("o.weight", [[0, 8], [0, 6]]), ("norm", [[0, 5]])]
    taker = {
        "receives": [(0, own)],
        "staged": {"o.weight": ((8, 6), "bf16"), "norm": ((5,), "fp32")},
    }
    ranks.run(
        [
            {"sends": [(1, parts[0]), (2, parts[1])]},
            *(
                {**taker, "convert": [("o.weight", "int8", (1, 2)), ("norm", "cast", (n,))]}
                for n in (1, 2)
            ),
        ]
    )
    assert [report.state for report in ranks.wait()] == ["done"] * 3
    scale = weight.float().abs().amax(dim=1, keepdim=True) / 127
    scale[scale == 0] = 1
    whole = torch.clamp(torch.round(weight.float() / scale), -127, 127).to(torch.int8)
    assert torch.equal(torch.cat([one["o.weight"] for one in targets], dim=1), whole)
    for one in targets:
        assert torch.equal(one["o.weight_scale"], scale)
        assert torch.equal(one["norm"], norm.to(torch.bfloat16))


def shown(tensors: dict[str, Any]) -> Any:
    """The memory that these tensors lie in from now on, with what they were."""
    import torch  # noqa: PLC0415

    from oserve.engines.weights.memory import WeightMemory  # noqa: PLC0415

    before = {name: one.clone() for name, one in tensors.items()}
    memory = WeightMemory(tensors.values(), kept_bytes=8)
    for name, tensor in tensors.items():
        lost = memory.holds(tensor) and tensor.nbytes > 8
        assert torch.equal(tensor, torch.zeros_like(tensor) if lost else before[name])
        tensor.copy_(before[name])
    return memory


@pytest.mark.extra
def test_mapped_parts_are_copied_and_the_others_sent(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    source = {
        "w": torch.randn(64, 48, dtype=torch.bfloat16),
        "norm": torch.randn(48),
        # Not contiguous: stays where it is.
        "t": torch.randn(6, 4).t(),
        "scale": torch.tensor(3.0),
    }
    memory = shown(source)
    assert not memory.holds(source["t"])
    # In another place there, the second half of the columns.
    target = {
        "v": torch.zeros(64, 24, dtype=torch.bfloat16),
        "norm": torch.zeros(48),
        "t": torch.zeros(4, 6),
        "scale": torch.tensor(0.0),
    }
    ranks = Ranks(tmp_path, [source, target], {0: memory})
    ranks.run(
        [
            {
                "sends": [
                    (
                        1,
                        [
                            ("w", [[0, 64], [24, 48]]),
                            ("norm", [[0, 48]]),
                            ("t", [[0, 4], [0, 6]]),
                            ("scale", []),
                        ],
                    )
                ]
            },
            {
                "receives": [
                    (
                        0,
                        [
                            ("v", [[0, 64], [0, 24]]),
                            ("norm", [[0, 48]]),
                            ("t", [[0, 4], [0, 6]]),
                            ("scale", []),
                        ],
                    )
                ]
            },
        ]
    )
    reports = ranks.wait()
    assert [report.state for report in reports] == ["done"] * 2
    assert reports[0].sent_bytes == reports[1].received_bytes == 64 * 24 * 2 + 196 + 96
    assert torch.equal(target["v"], source["w"][:, 24:])
    for name in ("norm", "t", "scale"):
        assert torch.equal(target[name], source[name])


@pytest.mark.extra
def test_mapped_memory_is_read_only_in_effect_and_outlives_its_owner() -> None:
    torch = pytest.importorskip("torch")
    from oserve.engines.weights.memory import mapped  # noqa: PLC0415

    own = {"a": torch.arange(5.0), "b": torch.arange(6, dtype=torch.int8).view(2, 3)}
    memory = shown(own)
    places = memory.places({**own, "other": torch.zeros(3)})
    assert set(places) == {"a", "b"}
    seen = mapped(os.dup(memory.descriptor), places)
    assert all(torch.equal(seen[name], own[name]) for name in own)
    own["b"][0, 0] = 7
    seen["a"][0] = 9
    assert own["a"][0] == 0
    os.close(memory.descriptor)
    del memory, own
    assert seen["b"].tolist() == [[7, 1, 2], [3, 4, 5]]


@pytest.mark.extra
@pytest.mark.parametrize("show", [False, True])
def test_one_that_fails_or_is_aborted_ends_the_others(tmp_path: Path, show: bool) -> None:
    torch = pytest.importorskip("torch")
    part = [("w", [[0, 1000]])]
    for how in ("abort", "unknown", "limit"):
        folder = tmp_path / how
        folder.mkdir()
        given = {"w": torch.ones(1000)} if how != "unknown" else {}
        memories = {0: shown(given)} if show else {}
        ranks = Ranks(folder, [given, {"w": torch.zeros(1000)}], memories)
        slow = {"bytes_per_s": 10.0}
        ranks.run(
            [{"sends": [(1, part)], **slow}, {"receives": [(0, part)], **slow}],
            limit_s=0.3 if how == "limit" else 20.0,
        )
        if how == "abort":
            ranks.jobs[1 if show else 0].abort()
        giver, taker = ranks.wait()
        assert taker.state == "failed"
        # Whoever only shows what it has may be done before.
        assert giver.state in ({"done", "failed"} if show else {"failed"})
        assert all(one.reason for one in (giver, taker) if one.state == "failed")


@pytest.mark.extra
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_sums_on_devices_tell_changes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    from oserve.engines.weights import sums  # noqa: PLC0415

    # So that a tensor is summed in several pieces.
    monkeypatch.setattr(sums, "_SUM_BYTES", 64)
    dtype = getattr(torch, kind)
    torch.manual_seed(0)
    whole = torch.randint(-100, 100, (31, 14)).to(dtype)
    part = whole[:, 3:10]
    known = sums.device_sum(part)
    assert known == sums.device_sum(part.contiguous())
    found = {known}
    for row in range(31):
        other = part.clone()
        bits = other.view(torch.uint8)
        bits[row, row % bits.shape[1]] ^= 1 << row % 8
        found.add(sums.device_sum(other))
        other = part.clone()
        other[[row, (row + 5) % 31]] = part[[(row + 5) % 31, row]]
        found.add(sums.device_sum(other))
    # Each pair of rows of the second kind comes up once.
    assert len(found) == 1 + 31 + 31
    assert sums.device_sum(torch.tensor(2.0)) != sums.device_sum(torch.tensor(3.0))
