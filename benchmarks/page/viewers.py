"""What viewers of the page cost a gateway process, in % of a core.

    python benchmarks/page/viewers.py [--viewers 50] [--seconds 30]

A server with emulated engines runs under a light load; the CPU time of its gateway process is read
with no viewer and with so many, in turns. Then a viewer that reads nothing joins, and how long it
is kept is measured. Viewers run in this process.
"""

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path

import aiohttp

from oserve.sim import EmulatedEngine

EVENTS = "/oserve/v1/page/events"


def listener(port: int) -> int:
    """The id of the process that listens on a port of this machine."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    inodes = {row[9] for row in rows if row[3] == "0A" and int(row[1].split(":")[1], 16) == port}
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if str(link.readlink()).strip("socket:[]") in inodes:
                return int(link.parts[2])
        except OSError:
            continue
    raise RuntimeError(f"nobody listens on {port}")


def cpu_s(pid: int) -> float:
    """CPU time of all its threads."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(item.read_text().split()[0]) for item in tasks) / 1e9


class Viewer:
    """Reads the stream and counts its bytes after the first event."""

    def __init__(self) -> None:
        self.received = 0

    async def watch(self, session: aiohttp.ClientSession, url: str) -> None:
        async with session.get(url + EVENTS, read_bufsize=1 << 22) as answer:
            assert answer.status == 200, await answer.text()
            await answer.content.readuntil(b"\n\n")
            async for data in answer.content.iter_any():
                self.received += len(data)


async def load(session: aiohttp.ClientSession, url: str) -> None:
    body = {"model": "m", "prompt": "a b c d", "max_tokens": 8, "stream": True}
    while True:
        async with session.post(url + "/v1/completions", json=body) as answer:
            await answer.read()
        await asyncio.sleep(0.2)


async def busy(pid: int, seconds: float) -> float:
    """CPU use in %."""
    before, began_s = cpu_s(pid), time.monotonic()
    await asyncio.sleep(seconds)
    return 100.0 * (cpu_s(pid) - before) / (time.monotonic() - began_s)


async def measure(url: str, pid: int, viewers: int, seconds: float, turns: int) -> None:
    timeout = aiohttp.ClientTimeout(total=None, sock_read=60)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        asking = asyncio.ensure_future(load(session, url))
        costs = []
        for turn in range(turns):
            alone = await busy(pid, seconds)
            them = [Viewer() for _ in range(viewers)]
            tasks = [asyncio.ensure_future(item.watch(session, url)) for item in them]
            await asyncio.sleep(5.0)
            for item in them:
                item.received = 0
            watched = await busy(pid, seconds)
            rate = sum(item.received for item in them) / viewers / seconds
            costs.append(watched - alone)
            print(
                f"turn {turn + 1}: {alone:.2f} % without viewers, {watched:.2f} % with {viewers}: "
                f"{watched - alone:.2f} % of a core; {rate:,.0f} bytes/s a viewer",
                flush=True,
            )
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.sleep(2.0)
        asking.cancel()
        print(f"mean: {sum(costs) / turns:.2f} % of a core for {viewers} viewers")


async def deaf(port: int) -> float:
    """Seconds until a viewer that reads nothing is dropped."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
    writer.write(f"GET {EVENTS} HTTP/1.1\r\nhost: a\r\n\r\n".encode())
    began_s = time.monotonic()
    # A reader that nobody reads takes a few kilobytes in, and no more.
    sock = writer.get_extra_info("socket")
    while time.monotonic() - began_s < 900.0:
        await asyncio.sleep(1.0)
        # TCP_INFO's first byte is the state; 1 is an open connection.
        if sock.getsockopt(6, 11, 1)[0] != 1:
            break
    writer.close()
    del reader
    return time.monotonic() - began_s


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--viewers", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--deaf", action="store_true", help="measure the deaf viewer, too")
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lines = ["id: attached", "workload_types: [{name: all}]", "replicas:"]
        engines = [EmulatedEngine(model="m") for _ in range(8)]
        for index, engine in enumerate(engines):
            where = await engine.start()
            lines.append(f'  - {{id: r{index}, attach: {{url: "http://127.0.0.1:{where}"}}}}')
        plan = Path(folder) / "plan.yaml"
        plan.write_text("\n".join(lines))
        command = [sys.executable, "-m", "oserve.cli", "serve", "--plan", str(plan)]
        command += ["--served-model-name", "m", "--port", "0", "--state-dir", f"{folder}/state"]
        with Path(folder, "log").open("wb") as log:  # noqa: ASYNC230
            server = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log)
        try:
            text = ""
            while "curl http://" not in text:
                assert server.returncode is None, text
                await asyncio.sleep(0.5)
                text = await asyncio.to_thread(Path(folder, "log").read_text)
            url = "http://" + text.partition("curl http://")[2].partition("/v1/")[0]
            port = int(url.rpartition(":")[2])
            await measure(url, listener(port), wanted.viewers, wanted.seconds, wanted.turns)
            if wanted.deaf:
                print(f"one that reads nothing is dropped after {await deaf(port):.0f} s")
        finally:
            server.terminate()
            await server.wait()
            for engine in engines:
                await engine.stop()


asyncio.run(main())
