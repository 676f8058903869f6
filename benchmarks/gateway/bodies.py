"""Arbitrary bodies through a gateway's socket: every one is answered, every slot freed.

    python benchmarks/gateway/bodies.py [--bodies 100000] [--connections 64] [--seed 1]

A process serves a gateway in front of three emulated engines that break off, abort and fail now and
then, while routing tables change and replicas hand over. This one sends bodies at random (see
``oserve.sim.fuzz``), and counts what it gets back. In the end the gateway says what is left.
"""

import argparse
import asyncio
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import uvloop

from oserve.control.dispatch.table import RoutingTable, TableReplica
from oserve.core import Endpoint, LengthClass, ReplicaPhase
from oserve.core.faults import fault
from oserve.gateway.http.server import Gateway
from oserve.gateway.settings import GatewaySettings
from oserve.sim import EmulatedEngine, EngineSpeed, Mishap
from oserve.sim.fuzz import fuzzed_body

PATHS = ("/v1/completions", "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
LIMIT_S = 60.0
HOWS = ("break", "torn", "abort", "error")


# -- the server ------------------------------------------------------------------------------------
async def serve(seed: int) -> None:
    """Serve until told to end; then tell what is left."""
    draw = Random(seed)
    faults: list[str] = []
    loop = asyncio.get_running_loop()

    def note(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        told = fault(error) if isinstance(error, BaseException) else ""
        faults.append(f"{context.get('message')}: {told}")

    loop.set_exception_handler(note)
    speeds = (EngineSpeed(), EngineSpeed(ttft_s=0.001), EngineSpeed(ttft_s=0.001, tpot_s=0.001))
    engines = [EmulatedEngine(most_tokens=12, keep_bodies=False, speed=it) for it in speeds]
    table = await table_of(engines)
    gateway = Gateway(GatewaySettings(port=0, shutdown_grace_s=0.0), models=("emulated",))
    gateway.runner.update(table)
    print(await gateway.listen(), flush=True)
    ended = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, ended.set)
    while not ended.is_set():
        await asyncio.sleep(0.02)
        for engine in engines:
            engine.mishaps.extend(
                Mishap(after=draw.randint(0, 10), how=draw.choice(HOWS)) for _ in range(2)
            )
        gateway.runner.update(table)
        if draw.random() < 0.2:
            gateway.runner.hand_over(draw.choice(["r0", "r1", "r2"]), 0.0)
            await asyncio.sleep(0.01)
            # Its next start: what ran on it is broken off, and it serves again.
            later = [replace(item, started_s=item.started_s + 1) for item in table.replicas]
            table = replace(table, replicas=tuple(later))
    runner = gateway.runner
    left = {
        "faults": faults,
        "booked": sum(count for _, count in runner.outstanding().values()),
        "active": len(runner.active),
        "queued": runner.queued,
        "waiting": len(runner.machine.waiting),
        "ended": dict(runner.metrics.snapshot()["oserve_requests"]),
        "moved": sum(
            value[0] for value in runner.metrics.snapshot()["oserve_requests_moved"].values()
        ),
    }
    print(json.dumps(left), flush=True)


async def table_of(engines: list[EmulatedEngine]) -> RoutingTable:
    """Three replicas that differ in all that changes how a body is written; few places each."""
    more: tuple[dict[str, Any], ...] = (
        {"accepts_priority": True, "returns_token_ids": True},
        {"accepts_priority": False, "returns_token_ids": True, "model": "renamed"},
        {"accepts_priority": True, "returns_token_ids": True},
    )
    ports = [await engine.start() for engine in engines]
    replicas = tuple(
        TableReplica(
            id=f"r{index}",
            shape="emulated",
            phase=ReplicaPhase.READY,
            endpoint=Endpoint(url=f"http://127.0.0.1:{port}"),
            max_inflight=8,
            max_model_len=8192,
            prefill_s_per_token=1e-4,
            decode_s_per_token=1e-3,
            **more[index],
        )
        for index, port in enumerate(ports)
    )
    share = {replica.id: 1 / 3 for replica in replicas}
    return RoutingTable(
        plan_id="p",
        length_classes=(LengthClass(name="short", max_prompt_tokens=512), LengthClass(name="long")),
        routing_shares={"short": share, "long": share},
        replicas=replicas,
        expected=True,
    )


# -- the clients -----------------------------------------------------------------------------------
class Clients:
    """Connections that send one body after the other, each from its own seed."""

    def __init__(self, port: int, bodies: int, seed: int) -> None:
        self._port = port
        self._left = bodies
        self._seed = seed
        self.statuses: Counter[int] = Counter()
        self.unanswered = 0
        self.cut = 0
        self.slowest_s = 0.0

    async def run(self, connections: int) -> None:
        await asyncio.gather(*(self._client(number) for number in range(connections)))

    async def _client(self, number: int) -> None:
        draw = Random(self._seed * 1_000_003 + number)
        writer = None
        while self._left > 0:
            self._left -= 1
            body = fuzzed_body(draw)
            head = (
                f"POST {draw.choice(PATHS)} HTTP/1.1\r\nhost: x\r\n"
                f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
            )
            if writer is None:
                reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
            started_s = time.monotonic()
            writer.write(head.encode() + body)
            try:
                async with asyncio.timeout(LIMIT_S):
                    kept = await self._answer(reader)
            except (OSError, EOFError, TimeoutError) as error:
                self.unanswered += 1
                print("unanswered:", type(error).__name__, body[:80], file=sys.stderr)
                kept = False
            self.slowest_s = max(self.slowest_s, time.monotonic() - started_s)
            if not kept:
                writer.close()
                writer = None
        if writer is not None:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader) -> bool:
        """Take an answer in; whether the connection is still good."""
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        status = int(head[9:12])
        self.statuses[status] += 1
        try:
            if b"transfer-encoding: chunked" in head:
                while (size := int(await reader.readline(), 16)) > 0:
                    await reader.readexactly(size + 2)
                await reader.readline()
            else:
                length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
                await reader.readexactly(length)
        except (OSError, EOFError, ValueError):
            # It began; its replica failed, and the stream could not go on elsewhere.
            self.cut += 1
            return False
        return b"connection: close" not in head


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bodies", type=int, default=100_000)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    if wanted.serve:
        uvloop.run(serve(wanted.seed))
        return
    command = [sys.executable, __file__, "--serve", "--seed", str(wanted.seed)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        assert server.stdout is not None
        clients = Clients(int(server.stdout.readline()), wanted.bodies, wanted.seed)
        started_s = time.monotonic()
        uvloop.run(clients.run(wanted.connections))
        took_s = time.monotonic() - started_s
        dead = server.poll() is not None
        time.sleep(1.0)
        server.terminate()
        left = json.loads(server.stdout.readline() or "{}")
    report = {
        "bodies": wanted.bodies,
        "wall_s": round(took_s, 1),
        "statuses": {str(key): clients.statuses[key] for key in sorted(clients.statuses)},
        "unanswered": clients.unanswered,
        "broken off after the head": clients.cut,
        "slowest_s": round(clients.slowest_s, 2),
        "dead processes": int(dead),
        "in the gateway in the end": left,
    }
    text = json.dumps(report, indent=2)
    print(text)
    if wanted.json:
        wanted.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
