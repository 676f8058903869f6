"""What a million random API keys cost the gateway, and whether a valid one still passes.

    .venv/bin/python benchmarks/gateway/keys.py [--tries 1000000] [--addresses 10000]

Requests with random keys go through the whole of the gateway but for sockets (see ``inside.py``),
from so many addresses in turn. Prints the CPU time of a try at the beginning and at the end, the
growth of memory, and what the log had. Half of the keys look like made ones, half are short.
"""

import argparse
import asyncio
import logging
import random
import tempfile
import time
from pathlib import Path
from typing import Any, cast

from inside import Silent, asked, connected, made_keys

from oserve.gateway.access.keys import KEY_PREFIX
from oserve.wire.connection import ServerConnection

KEYS = 1000
WARM = 20_000


class Peer(Silent):
    """A transport from one address that keeps the status of the last answer."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.status = b""

    def get_extra_info(self, name: str) -> Any:
        return (self.address, 50_000) if name == "peername" else None

    def write(self, data: bytes) -> None:
        self.status = data[9:12]

    def writelines(self, parts: list[bytes]) -> None:
        self.write(b"".join(parts))


class Seen(logging.Handler):
    """Counts log lines, and those with a part of a key that was tried."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines = self.leaks = 0
        self.tried = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.lines += 1
        self.leaks += self.tried in self.format(record)


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tries", type=int, default=1_000_000)
    parser.add_argument("--addresses", type=int, default=10_000)
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        keys_file = Path(folder) / "keys.json"
        valid = made_keys(keys_file, KEYS)[0]
        first, upstream = connected(keys_file)
    del upstream
    seen = Seen()
    logging.getLogger().addHandler(seen)
    logging.getLogger().setLevel(logging.DEBUG)
    peers = [Peer(f"10.{n >> 16 & 255}.{n >> 8 & 255}.{n & 255}") for n in range(wanted.addresses)]
    clients = []
    for peer in peers:
        client = ServerConnection(first._server)
        client.connection_made(cast(Any, peer))
        clients.append(client)
    chance = random.Random(0)
    statuses: dict[bytes, int] = {}
    spent_s = [0.0, 0.0]
    start_mib = 0.0
    for number in range(wanted.tries):
        if number == WARM:
            start_mib = resident_mib()
        size = 43 if number % 2 else 8
        seen.tried = "".join(chance.choices("abcdefghijklmnopqrstuvwxyz0123456789", k=size))
        request = asked(stream=False, key=(KEY_PREFIX if number % 2 else "") + seen.tried)
        at = number % len(clients)
        before_s = time.process_time()
        clients[at].data_received(request)
        spent_s[number >= wanted.tries // 2] += time.process_time() - before_s
        status = peers[at].status
        statuses[status] = statuses.get(status, 0) + 1
    half = wanted.tries // 2
    last = Peer(peers[0].address)
    client = ServerConnection(first._server)
    client.connection_made(cast(Any, last))
    client.data_received(
        b"GET /v1/models HTTP/1.1\r\nhost: b\r\nauthorization: Bearer %b\r\n\r\n" % valid.encode()
    )
    told = ", ".join(
        f"{count} with {status.decode()}" for status, count in sorted(statuses.items())
    )
    print(f"answers: {told}; a valid key from such an address: {last.status.decode()}")
    print(
        f"CPU time of a try: {1e6 * spent_s[0] / half:.1f} us in the first half, "
        f"{1e6 * spent_s[1] / (wanted.tries - half):.1f} us in the second"
    )
    print(f"memory: {resident_mib() - start_mib:+.1f} MiB after the first {WARM} tries")
    print(f"log: {seen.lines} lines, {seen.leaks} of them with a key")


if __name__ == "__main__":
    asyncio.run(main())
