"""What the hatch costs: a streamed chunk through it, and weights from node to node.

    python benchmarks/nodes/hatch.py [--chunks 1500] [--gap-ms 2] [--megabytes 1000] [--rounds 3]

Chunks: a server on a Unix socket sends stamped chunks at a steady pace; a client reads them from
the socket itself, through a process that passes bytes on to TCP without TLS, and through a hatch,
in turns. Delay is from before the server's write to after the client's read; CPU is that of the
process between and what the client needs more.

Weights: bytes from one process to another over a plain TCP connection, over one TLS connection, and
by the streams of ranks through the hatches of two nodes, by sockets and by memory that the hatches
map, in turns. A share is the median of those of each turn. Everything is on one machine, so that
copies compete with TLS for the same cores.
"""

import argparse
import asyncio
import contextlib
import mmap
import multiprocessing
import os
import platform
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import uvloop

from oserve.core import HatchAddress
from oserve.engines.weights.relay_orders import FileRange
from oserve.engines.weights.sockets import Listener, ShardStream, Throttle, far_address
from oserve.nodes.hatch_identity import make_identity, serving_context
from oserve.nodes.hatch_messages import HatchConfig, HatchIdentity, read_published, tell_peers
from oserve.wire.hatch import open_hatch, pinned_context

_CHUNK = b"data: " + b"x" * 240 + b"\n\n"
_STAMP_BYTES = 20
_LIMIT_S = 120.0
_PART_BYTES = 16 << 20
# Threads of ranks that move weights yield to serving, and so does the hatch's second process.
_NICE = 5
_TICKS = os.sysconf("SC_CLK_TCK")


class Node:
    """A hatch process and its folder."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder / name
        self.folder.mkdir(mode=0o700)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "oserve.nodes.hatch"], stdin=subprocess.PIPE
        )
        config = HatchConfig(node=name, folder=str(self.folder), host="127.0.0.1")
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(config) + b"\n")
        self._process.stdin.flush()
        end_s = time.monotonic() + _LIMIT_S
        while (found := read_published(self.folder)) is None:
            if time.monotonic() > end_s or self._process.poll() is not None:
                raise SystemExit("a hatch did not start")
            time.sleep(0.02)
        self.address: HatchAddress = found.address("127.0.0.1")

    @property
    def out(self) -> str:
        return str(self.folder / "out.sock")

    def cpu_s(self) -> float:
        """Seconds of CPU of both of its processes."""
        pids = [self._process.pid]
        tasks = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        pids += [int(one) for one in tasks.read_text().split()]
        return sum(_cpu_s(pid) for pid in pids)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(_LIMIT_S)


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _own_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


# -- chunks ---------------------------------------------------------------------------------------
def _chunk_server(path: str, gap_s: float) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(int(await reader.readline())):
            writer.write(b"%020d" % time.monotonic_ns() + _CHUNK)
            await asyncio.sleep(gap_s)
        writer.close()

    async def run() -> None:
        server = await asyncio.start_unix_server(serve, path)
        await server.serve_forever()

    uvloop.run(run())


async def _delays_us(
    opened: tuple[asyncio.StreamReader, asyncio.StreamWriter], count: int
) -> list[float]:
    reader, writer = opened
    writer.write(b"%d\n" % count)
    delays = []
    for _ in range(count):
        data = await reader.readexactly(_STAMP_BYTES + len(_CHUNK))
        delays.append((time.monotonic_ns() - int(data[:_STAMP_BYTES])) / 1e3)
    writer.close()
    return delays


def _bare_relay(port: socket.socket, path: str) -> None:
    """What any relay costs: a thread for each direction that reads and writes, without TLS."""

    def pass_on(source: socket.socket, sink: socket.socket) -> None:
        buffer = bytearray(65536)
        view = memoryview(buffer)
        while size := source.recv_into(buffer):
            sink.sendall(view[:size])
        sink.shutdown(socket.SHUT_WR)

    while True:
        outer, _ = port.accept()
        outer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        inner = socket.socket(socket.AF_UNIX)
        inner.connect(path)
        threading.Thread(target=pass_on, args=(outer, inner), daemon=True).start()
        threading.Thread(target=pass_on, args=(inner, outer), daemon=True).start()


async def _chunks(node: Node, name: str, relay: tuple[int, int], count: int, rounds: int) -> None:
    """``relay``: process and port of the bare one."""
    path = str(node.folder / name)
    ways = ("direct", "bare relay", "hatch")
    delays: dict[str, list[float]] = {way: [] for way in ways}
    client_s, relay_s = dict.fromkeys(ways, 0.0), dict.fromkeys(ways, 0.0)
    for _ in range(rounds):
        for way in ways:
            if way == "direct":
                opened = await asyncio.open_unix_connection(path)
            elif way == "hatch":
                opened = await open_hatch(node.address, name)
            else:
                opened = await asyncio.open_connection("127.0.0.1", relay[1])

            def used_s(way: str = way) -> float:
                return node.cpu_s() if way == "hatch" else _cpu_s(relay[0])

            own_s, its_s = _own_cpu_s(), used_s()
            delays[way] += await _delays_us(opened, count)
            client_s[way] += _own_cpu_s() - own_s
            relay_s[way] += used_s() - its_s
    whole = count * rounds / 1e6
    direct = statistics.median(delays["direct"])
    for way, found in delays.items():
        cuts = statistics.quantiles(found, n=100)
        more_us = (client_s[way] - client_s["direct"]) / whole
        print(
            f"chunks, {way}: P50 {cuts[49]:.0f} us, P90 {cuts[89]:.0f}, P99 {cuts[98]:.0f}; added: "
            f"P50 {cuts[49] - direct:.0f} us, CPU a chunk: relay {relay_s[way] / whole:.0f} us, "
            f"client {more_us:+.0f} us"
        )


def measure_chunks(folder: Path, count: int, gap_s: float, rounds: int) -> None:
    """Print delays and CPU of chunks, direct, through a bare relay and through a hatch."""
    node = Node(folder, "n")
    (node.folder / "e").mkdir()
    path = str(node.folder / "e" / "api.sock")
    server = multiprocessing.Process(target=_chunk_server, args=(path, gap_s), daemon=True)
    server.start()
    while not os.path.exists(path):
        time.sleep(0.02)
    with socket.create_server(("127.0.0.1", 0)) as port:
        bare = multiprocessing.Process(target=_bare_relay, args=(port, path), daemon=True)
        bare.start()
        assert bare.pid is not None
        relay = (bare.pid, port.getsockname()[1])
        uvloop.run(_chunks(node, "e/api.sock", relay, count, rounds))
        bare.kill()
    server.kill()
    node.close()


# -- weights --------------------------------------------------------------------------------------
def _give(open_stream: Callable[[], ShardStream], size: int) -> None:
    os.nice(_NICE)
    stream = open_stream()
    data = memoryview(bytearray(os.urandom(1 << 20)) * (size >> 20))
    stream.take(1)
    stream.send(0, data, Throttle(0.0, threading.Event()))
    stream.take(1)
    stream.close()


def _take(stream: ShardStream, size: int) -> tuple[float, float]:
    """Seconds, and of this process's CPU."""
    data = memoryview(bytearray(b"\1") * size)  # no page is new
    stream.give(memoryview(b"\1"))
    start_s, own_s = time.perf_counter(), _own_cpu_s()
    stream.receive(0, data)
    spent_s, used_s = time.perf_counter() - start_s, _own_cpu_s() - own_s
    stream.give(memoryview(b"\1"))
    return spent_s, used_s


def _deadline_s() -> float:
    return time.monotonic() + _LIMIT_S


def plain_copy_s(size: int) -> float:
    with socket.create_server(("127.0.0.1", 0)) as port:
        address = port.getsockname()

        def called() -> ShardStream:
            return ShardStream(socket.create_connection(address), _deadline_s())

        giver = multiprocessing.Process(target=_give, args=(called, size))
        giver.start()
        connection, _ = port.accept()
        stream = ShardStream(connection, _deadline_s())
        spent_s, _ = _take(stream, size)
        giver.join()
        stream.close()
    return spent_s


def _tls(size: int, identity: HatchIdentity) -> float:
    """One TLS connection without any hatch: what encryption alone costs."""
    with socket.create_server(("127.0.0.1", 0)) as port:
        address = port.getsockname()

        def give() -> None:
            os.nice(_NICE)
            data = memoryview(bytearray(os.urandom(1 << 20)))
            with pinned_context(identity.certificate).wrap_socket(
                socket.create_connection(address)
            ) as tls:
                for _ in range(size >> 20):
                    tls.sendall(data)
                tls.recv(1)

        giver = multiprocessing.Process(target=give)
        giver.start()
        connection, _ = port.accept()
        with serving_context(identity).wrap_socket(connection, server_side=True) as tls:
            data = memoryview(bytearray(b"\1") * size)
            start_s, done = time.perf_counter(), 0
            while done < size:
                done += tls.recv_into(data[done:])
            spent_s = time.perf_counter() - start_s
            tls.sendall(b"k")
        giver.join()
    return spent_s


def _relayed(a: Node, b: Node, size: int) -> float:
    """By the ranks' sockets: weights that do not lie in memory which the hatches can map."""
    (b.folder / "e").mkdir(exist_ok=True)
    listener = Listener(str(b.folder / "e" / "w0.sock"))
    address = far_address("b", "e/w0.sock", a.out)

    def called() -> ShardStream:
        return ShardStream.call(address, "t", 1, _deadline_s())

    giver = multiprocessing.Process(target=_give, args=(called, size))
    giver.start()
    stream = listener.accept("t", [1], _deadline_s())[1]
    spent_s, _ = _take(stream, size)
    giver.join()
    stream.close()
    listener.close()
    return spent_s


@contextlib.contextmanager
def _memory(size: int) -> Iterator[int]:
    """A file in memory, all of whose pages exist."""
    descriptor = os.memfd_create("weights")
    os.ftruncate(descriptor, size)
    with mmap.mmap(descriptor, size) as memory:
        piece = os.urandom(1 << 20)
        for start in range(0, size, len(piece)):
            memory[start : start + len(piece)] = piece
        yield descriptor
    os.close(descriptor)


def _ordered(a: Node, b: Node, size: int) -> float:
    """As ranks do whose weights lie in shared memory: the hatches read and write it."""
    (b.folder / "e").mkdir(exist_ok=True)
    listener = Listener(str(b.folder / "e" / "w0.sock"))
    address = far_address("b", "e/w0.sock", a.out)
    parts = list(FileRange(0, size, size, 1).cut(_PART_BYTES))

    def give() -> None:
        os.nice(_NICE)
        with _memory(size) as descriptor:
            stream = ShardStream.call(address, "t", 1, _deadline_s())
            stream.take(1)
            throttle = Throttle(0.0, threading.Event())
            for number, part in enumerate(parts):
                stream.order_send(number, descriptor, part, throttle)
            stream.give_head(len(parts), 0)
            stream.take(1)
            stream.close()

    giver = multiprocessing.Process(target=give)
    giver.start()
    stream = listener.accept("t", [1], _deadline_s())[1]
    with _memory(size) as descriptor:
        start_s = time.perf_counter()
        stream.order_take(descriptor, parts)
        stream.give(memoryview(b"\1"))
        for number, part in enumerate(parts):
            stream.take_head(number, part.size)
        stream.take_head(len(parts), 0)
        spent_s = time.perf_counter() - start_s
        stream.give(memoryview(b"\1"))
    giver.join()
    stream.close()
    listener.close()
    return spent_s


def measure_bulk(folder: Path, size: int, rounds: int) -> None:
    """Print the rates of a plain TCP copy and of weights through two hatches, in turns."""
    os.nice(_NICE)
    a, b = Node(folder, "a"), Node(folder, "b")
    uvloop.run(tell_peers(a.address, {"b": b.address}))
    identity = make_identity("n")
    ways: dict[str, Callable[[int], float]] = {
        "plain TCP": plain_copy_s,
        "one TLS socket": lambda size: _tls(size, identity),
        "two hatches, ranks' sockets": lambda size: _relayed(a, b, size),
        "two hatches, ranks' memory": lambda size: _ordered(a, b, size),
    }
    rates: dict[str, list[float]] = {way: [] for way in ways}
    hatches_s = dict.fromkeys(ways, 0.0)
    for _ in range(rounds):
        for way, copy_s in ways.items():
            before_s = a.cpu_s() + b.cpu_s()
            rates[way].append(size / copy_s(size) / 1e6)
            hatches_s[way] += a.cpu_s() + b.cpu_s() - before_s
    for way, found in rates.items():
        told = ", ".join(f"{rate:.0f}" for rate in found)
        shares = [rate / plain for rate, plain in zip(found, rates["plain TCP"], strict=True)]
        print(
            f"weights, {way}: median {statistics.median(found):.0f} MB/s ({told}), "
            f"{statistics.median(shares):.2f} of plain TCP, hatches' CPU "
            f"{hatches_s[way] / rounds / size * 1e9:.2f} s a GB"
        )
    a.close()
    b.close()


def machine() -> str:
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    load = os.getloadavg()[0]
    return f"{len(os.sched_getaffinity(0))} cores of {model}, load {load:.1f} at the start"


def main(words: Sequence[str] | None = None) -> None:
    """Entry point."""
    multiprocessing.set_start_method("fork")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunks", type=int, default=1500)
    parser.add_argument("--gap-ms", type=float, default=2.0)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args(words)
    print(machine(), flush=True)
    with tempfile.TemporaryDirectory(prefix="h") as folder:
        if chosen.chunks:
            measure_chunks(Path(folder), chosen.chunks, chosen.gap_ms / 1e3, chosen.rounds)
        if chosen.megabytes:
            measure_bulk(Path(folder), chosen.megabytes << 20, chosen.rounds)


if __name__ == "__main__":
    main()
