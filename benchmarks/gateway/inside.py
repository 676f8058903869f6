"""Python that the gateway runs for an answer and for a chunk of a stream, without sockets.

    python benchmarks/gateway/inside.py [--rounds 20] [--tenants 1000] [--profile]

Client and replica are connections without a transport: bytes go in, bytes come out. Prints the CPU
time of the quickest round. The system calls and the event loop of a running gateway come on top.
"""

import argparse
import asyncio
import cProfile
import pstats
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import msgspec

from oserve.control.dispatch.table import RoutingTable, TableReplica
from oserve.core import Endpoint, KeyRole, LengthClass, ReplicaPhase
from oserve.gateway.access.keys import StoredKey, digest, empty_document, made_key
from oserve.gateway.http.errors import send_error, with_status
from oserve.gateway.http.headers import client_headers
from oserve.gateway.http.server import Gateway
from oserve.gateway.process.collection import rare_collections
from oserve.gateway.settings import GatewaySettings, TenancySettings, TenantSettings
from oserve.wire.connection import Connections, ServerConnection, ServerLimits
from oserve.wire.upstream import UpstreamConnection, UpstreamPool

ANSWERS, CHUNKS = 1000, 2000
ANSWER = (
    b'{"id":"cmpl-1","object":"text_completion","created":1,"model":"bench","choices":[{"index":0,'
    b'"text":" hello","logprobs":null,"finish_reason":"length"}],"usage":{"prompt_tokens":9,'
    b'"total_tokens":25,"completion_tokens":16}}'
)
WHOLE = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (
    len(ANSWER),
    ANSWER,
)
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
END = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


class Silent:
    """A transport that does nothing."""

    def is_closing(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_arguments, **_named: None


def asked(*, stream: bool, key: str = "") -> bytes:
    body = (
        b'{"model":"bench","prompt":"Write a short story about a dog.","max_tokens":4000,'
        b'"temperature":0,"ignore_eos":true,"stream":%b}' % (b"true" if stream else b"false")
    )
    return (
        b"POST /v1/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n%b\r\n%b"
        % (len(body), f"authorization: Bearer {key}\r\n".encode() if key else b"", body)
    )


def event(index: int) -> bytes:
    payload = (
        b'data: {"id":"cmpl-9f3c0de2a1b24c5d8e7f","object":"text_completion","created":1700000000,'
        b'"model":"bench","choices":[{"index":0,"text":" token","logprobs":null,"finish_reason":'
        b'null,"stop_reason":null,"prompt_token_ids":%b,"token_ids":[%d]}]}\n\n'
        % (b"[1,2,3]" if index == 0 else b"null", 30_000 + index)
    )
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def made_keys(path: Path, tenants: int) -> list[str]:
    """A key file with a key for each of so many tenants."""
    document = empty_document()
    made = [(f"t{number}", *made_key()) for number in range(tenants)]
    stored = tuple(
        StoredKey(
            id=name,
            tenant=tenant,
            role=KeyRole.USE,
            digest=digest(key.encode(), bytes.fromhex(document.salt)).hex(),
            created_s=0.0,
        )
        for tenant, name, key in made
    )
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(document, keys=stored)))
    return [key for _, _, key in made]


def connected(keys_file: Path) -> tuple[ServerConnection, UpstreamConnection]:
    """A client connection to a gateway, and its connection to the one replica."""
    limits = TenantSettings(requests_per_min=10**9, tokens_per_min=10**12, max_inflight=10**6)
    tenancy = TenancySettings(default=limits)
    settings = GatewaySettings(port=0, shutdown_grace_s=0.0, tenancy=tenancy)
    gateway = Gateway(settings, models=("bench",), keys_file=keys_file)
    replica = TableReplica(
        id="r0",
        shape="s",
        phase=ReplicaPhase.READY,
        endpoint=Endpoint(url="http://127.0.0.1:1"),
        max_inflight=64,
        max_model_len=8192,
        accepts_priority=True,
        returns_token_ids=True,
        prefill_s_per_token=1e-4,
        decode_s_per_token=1e-3,
    )
    table = RoutingTable(
        plan_id="p",
        length_classes=(LengthClass(name="all"),),
        routing_shares={"all": {"r0": 1.0}},
        replicas=(replica,),
    )
    gateway.runner.update(table)
    pool: UpstreamPool = next(iter(gateway.runner._pools.values()))
    refuse = lambda exchange, status, text: send_error(  # noqa: E731
        exchange, with_status(status, text), close=True
    )
    client = ServerConnection(Connections(gateway._handle, refuse, ServerLimits()))
    upstream = UpstreamConnection(pool)
    for connection in (client, upstream):
        connection.connection_made(cast(Any, Silent()))
    pool.give_back(upstream)
    return client, upstream


class Gauge:
    """A gateway with a client and a replica, and the CPU time that its work took.

    Its requests have as many different keys as there are ``tenants``; ``open_``: it knows of none.
    """

    def __init__(self, tenants: int, *, open_: bool = False) -> None:
        with tempfile.TemporaryDirectory() as folder:
            keys_file = Path(folder) / "keys.json"
            keys = made_keys(keys_file, tenants) if tenants else [""]
            self.client, self.upstream = connected(
                keys_file.with_name("none.json") if open_ else keys_file
            )
        self._requests = [asked(stream=False, key=key) for key in keys]
        self._stream = asked(stream=True, key=keys[0])
        self._events = [event(index) for index in range(CHUNKS + 1)]
        self.answer_s: list[float] = []
        self.chunk_s: list[float] = []

    def answers(self) -> None:
        """Ask and answer, as each tenant in turn."""
        # What another gauge keeps there is equal to what this one looks for, but not the same.
        client_headers.cache_clear()
        before_s = time.process_time()
        for number in range(ANSWERS):
            self.client.data_received(self._requests[number % len(self._requests)])
            self.upstream.data_received(WHOLE)
        self.answer_s.append((time.process_time() - before_s) / ANSWERS)

    def chunks(self) -> None:
        """Pass one stream on."""
        self.client.data_received(self._stream)
        self.upstream.data_received(HEAD + self._events[0])
        before_s = time.process_time()
        for one in self._events[1:]:
            self.upstream.data_received(one)
        self.chunk_s.append((time.process_time() - before_s) / CHUNKS)
        self.upstream.data_received(END)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--profile", action="store_true", help="also the costliest functions")
    parser.add_argument(
        "--tenants",
        type=int,
        default=0,
        help="each with a key and limits; compared with the same requests to an open gateway",
    )
    wanted = parser.parse_args()
    gauges = [Gauge(wanted.tenants, open_=True)]
    if wanted.tenants:
        gauges.append(Gauge(wanted.tenants))
    # As in a gateway process.
    rare_collections()
    for _ in range(wanted.rounds + 1):
        # In turn, since other work on the machine makes both slower.
        for gauge in gauges:
            gauge.answers()
            gauge.chunks()
    for gauge, name in zip(gauges, ("", " with tenants"), strict=False):
        print(f"an answer{name}: {1e6 * min(gauge.answer_s):.1f} us")
        print(f"a chunk{name}: {1e6 * min(gauge.chunk_s):.2f} us")
    if wanted.tenants:
        plain, keyed = gauges
        pairs = zip(plain.answer_s[1:], keyed.answer_s[1:], strict=True)
        ratios = sorted(with_s / without_s for without_s, with_s in pairs)
        low, middle, high = (ratios[len(ratios) * part // 10] for part in (1, 5, 9))
        print(
            f"an answer with tenants, ratio: {middle:.3f} (10 % to 90 %: {low:.3f} to {high:.3f})"
        )
    if wanted.profile:
        profile = cProfile.Profile()
        profile.runcall(gauges[-1].answers)
        pstats.Stats(profile).sort_stats("tottime").print_stats(20)


if __name__ == "__main__":
    asyncio.run(main())
