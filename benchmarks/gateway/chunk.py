"""CPU that the relay itself takes for a chunk of a stream, without sockets; and to read one again.

    python benchmarks/gateway/chunk.py [--other SRC] [--rounds 10]

``--other`` is the ``src`` folder of another version of OServe. Each round is a process of its own,
versions alternating; the least of all rounds is printed, in microseconds.
"""

import argparse
import asyncio
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import msgspec
from oserve.gateway.dispatch import Dispatcher
from oserve.gateway.relay import Relay

from oserve.control.dispatch.table import TableReplica
from oserve.core import Endpoint, ReplicaPhase, Request
from oserve.gateway.http.body import parse_body
from oserve.gateway.settings import GatewaySettings
from oserve.wire import Exchange, dechunk
from oserve.wire.upstream import UpstreamConnection

CHUNKS = 2000
BODY = b'{"prompt":"x","stream":true,"max_tokens":4000,"ignore_eos":true,"temperature":0}'
DECODE = msgspec.json.Decoder().decode
HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
TELLS = "tells_token_ids" in {field.name for field in dataclasses.fields(TableReplica)}


class Silent:
    """A client, a server and a pool that do nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_args, **_named: None


def event(index: int) -> bytes:
    ids = b"[%d]" % (30_000 + index) if TELLS else b"null"
    prompt = b"[1,2,3,4,5,6,7,8]" if TELLS and index == 0 else b"null"
    payload = (
        b'data: {"id":"cmpl-9f3c0de2a1b24c5d8e7f","object":"text_completion","created":1700000000,'
        b'"model":"bench","choices":[{"index":0,"text":" token","logprobs":null,"finish_reason":'
        b'null,"stop_reason":null,"prompt_token_ids":%b,"token_ids":%b}]}\n\n' % (prompt, ids)
    )
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def begun(dispatcher: Dispatcher) -> tuple[Relay, UpstreamConnection]:
    exchange = Exchange(cast(Any, Silent()))
    exchange.body, exchange.method, exchange.path = BODY, b"POST", b"/v1/completions"
    relay = Relay(
        dispatcher,
        exchange,
        request=Request(
            id="a", arrival_s=0.0, workload_type="x", prompt_tokens=1, output_tokens=4000
        ),
        request_id=b"a",
        parsed=parse_body(BODY),
        stream=True,
        hide_usage=True,
    )
    fields: dict[str, Any] = {
        "id": "r",
        "shape": "s",
        "phase": ReplicaPhase.READY,
        "endpoint": Endpoint(url="http://x"),
        "max_inflight": 9,
        "max_model_len": 0,
        "accepts_priority": False,
        "prefill_s_per_token": 1e-4,
        "decode_s_per_token": 1e-3,
    }
    connection = UpstreamConnection(cast(Any, Silent()))
    connection._transport = cast(Any, Silent())
    if TELLS:
        fields["tells_token_ids"] = True
    relay.sent_to(TableReplica(**fields), None)
    sink = relay.sink
    sink.attached(connection)
    connection.begin(b"", sink, reused=False)
    connection.data_received(HEAD)
    return relay, connection


def spent_us(work: Callable[[], object]) -> float:
    started_s = time.process_time()
    work()
    return 1e6 * (time.process_time() - started_s) / CHUNKS


async def measure() -> dict[str, float]:
    dispatcher = Dispatcher(GatewaySettings(), None)
    lone = [event(index) for index in range(CHUNKS)]
    many = [b"".join(lone[at : at + 64]) for at in range(0, CHUNKS, 64)]
    found: dict[str, list[float]] = {}
    for _ in range(8):
        for name, reads in {"one chunk a read": lone, "64 chunks a read": many}.items():
            relay, connection = begun(dispatcher)
            feed = connection.data_received
            taken = spent_us(lambda reads=reads, feed=feed: [feed(data) for data in reads])  # type: ignore[misc]
            found.setdefault(name, []).append(taken)
            if TELLS and relay.moving is not None:
                read = relay.moving._read
                found.setdefault("to read it again, when it moves", []).append(spent_us(read))
        parse = spent_us(lambda: [DECODE(dechunk(data)[6:-2]) for data in lone])
        found.setdefault("for comparison: to parse each event", []).append(parse)
    return {name: min(values) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--other", help="src folder of another version of OServe")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    if wanted.once:
        print(json.dumps(asyncio.run(measure())))
        return
    here = str(Path(__file__).resolve().parents[2] / "src")
    sources = {"this": here} | ({"other": wanted.other} if wanted.other else {})
    least: dict[str, dict[str, float]] = {name: {} for name in sources}
    for _ in range(wanted.rounds):
        for name, source in sources.items():
            command = [sys.executable, __file__, "--once"]
            out = subprocess.run(
                command, env={**os.environ, "PYTHONPATH": source}, capture_output=True, check=True
            ).stdout
            for what, value in json.loads(out).items():
                least[name][what] = min(value, least[name].get(what, value))
    for name, values in least.items():
        for what, value in values.items():
            print(f"{name:6} {what:40} {value:6.2f} us a chunk")


if __name__ == "__main__":
    main()
