"""`oserve serve` on host 0, engines on hosts 1 and 2, and clients whose streams are compared."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from hosts import Hosts, socket_on

PLAN = """
id: two-nodes
workload_types: [{name: all}]
replicas:
  - id: one
    shape: {precision: fp32, max_num_batched_tokens: 256, max_num_seqs: 16}
    devices: [host1/cpu:0]
  - id: two
    shape: {tensor_parallel_size: 2, precision: fp32, max_num_batched_tokens: 512, max_num_seqs: 8}
    devices: [host2/cpu:0, host2/cpu:1]
  - id: both
    shape:
      {pipeline_parallel_size: 2, precision: fp32, max_num_batched_tokens: 128, max_num_seqs: 8}
    devices: [host1/cpu:1, host2/cpu:2]
routing_shares: {all: {one: 0.4, two: 0.3, both: 0.3}}
"""
SETTINGS = (
    *("--port", "0", "--set", "engines.kv_cache_memory_bytes=67108864"),
    *("--set", "control.interval_s=0.2", "--set", "engines.orphan_grace_s=120"),
)
LIMIT_S = 420.0
NODES = (1, 2)
PORT = 7443
BODY = {"model": "tiny", "temperature": 0, "ignore_eos": True, "max_tokens": 24}
CLIENT = """
import sys, openai
client = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key="none")
wish = dict(model="tiny", messages=[{"role": "user", "content": "Hello!"}], temperature=0,
            max_tokens=8, extra_body={"ignore_eos": True})
whole = client.chat.completions.create(**wish).choices[0].message.content
pieces = [event.choices[0].delta.content or "" for event in
          client.chat.completions.create(**wish, stream=True)]
assert whole and "".join(pieces) == whole, (whole, pieces)
print("served")
"""


def surroundings() -> dict[str, str]:
    """The environment of every process on a host."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OSERVE_")}
    path = os.pathsep.join(item for item in sys.path if item)
    return kept | {"PYTHONPATH": path, "TMPDIR": "/tmp"}


@dataclass
class Scene:
    """A server on host 0, and ``oserve node serve`` on the others.

    ``model``: its folder, if not the one that all hosts share. ``slots``: devices of each node.
    ``plan``: without one the server computes it.
    """

    hosts: Hosts
    folder: Path
    env: dict[str, str]
    nodes: dict[int, "subprocess.Popen[bytes]"] = field(default_factory=dict)
    server: "subprocess.Popen[bytes] | None" = None
    cluster: str = ""
    url: str = ""
    starts: int = 0
    model: str = ""
    slots: int = 3
    plan: str = PLAN
    numbers: tuple[int, ...] = NODES

    # -- processes ------------------------------------------------------------------------------
    def serve_node(self, number: int) -> None:
        """Bring a host up as a node; returns when it has said what the cluster file needs."""
        host = self.hosts[number]
        if number in self.nodes:
            self.nodes[number].wait(timeout=60)
        log, told = self.folder / f"node{number}.log", self.folder / f"node{number}.yaml"
        words = ["--address", host.address, "--port", str(PORT), "--cpu-slots", str(self.slots)]
        words += ["--devices", "cpu", "--state-dir", str(self.folder / f"node{number}")]
        command = [sys.executable, "-m", "oserve.cli", "node", "serve", *words]
        with log.open("ab") as out, told.open("wb") as lines:
            process = subprocess.Popen(
                host.words(command),
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=lines,
                stderr=out,
                start_new_session=True,
            )
        self.nodes[number] = process
        wait(lambda: "certificate_sha256" in told.read_text(), process, log)

    def write_cluster(self) -> None:
        """The cluster file, of what the nodes have printed."""
        entries = [
            (self.folder / f"node{number}.yaml").read_text().partition("hosts:\n")[2]
            for number in self.numbers
        ]
        file = self.folder / "cluster.yaml"
        file.write_text("hosts:\n" + "".join(entries))
        self.cluster = str(file)

    def serve(self, *more: str) -> None:
        """Start `oserve serve` on host 0; returns when it says that it is ready."""
        self.starts += 1
        log = self.log_file
        words = ["--cluster", self.cluster, "--state-dir", self.state]
        if self.plan:
            words += ["--plan", str(self.folder / "plan.yaml")]
        model = self.model or str(self.folder / "tiny")
        command = [sys.executable, "-m", "oserve.cli", "serve", model, *words, *SETTINGS, *more]
        with log.open("wb") as out:
            self.server = self.hosts[0].popen(command, env=self.env, log=out)
        wait(lambda: "Ready on" in log.read_text(), self.server, log)
        line = next(line for line in log.read_text().splitlines() if line.startswith("Ready on"))
        self.url = line.split()[2]

    @property
    def state(self) -> str:
        return str(self.folder / "state")

    @property
    def log_file(self) -> Path:
        """Of the present server."""
        return self.folder / f"serve{self.starts}.log"

    def last_log(self) -> str:
        """What the present server has logged."""
        return self.log_file.read_text()

    def reach(self, true: Callable[[], bool]) -> None:
        """Wait for something that processes bring about."""
        deadline_s = time.monotonic() + LIMIT_S
        while not true():
            assert time.monotonic() < deadline_s, self.logs()
            time.sleep(0.05)

    def reach_log(self, words: str, times: int = 1) -> None:
        """Wait until the present server has logged these words so often."""
        self.reach(lambda: self.last_log().count(words) >= times)

    def logs(self) -> str:
        files = sorted([*self.folder.glob("*.log"), *self.folder.glob("*/logs/*.log")])
        files += sorted(self.folder.glob("node*/*/logs/*.log"))
        return "\n".join(f"== {file}\n{file.read_text()[-3000:]}" for file in files)

    def command(self, *words: str) -> str:
        """An operator's command on host 0."""
        done = self.cli(*words, "--url", self.url)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def cli(self, *words: str, host: int = 0) -> "subprocess.CompletedProcess[str]":
        """A command on a host, without a word of the server."""
        return subprocess.run(
            self.hosts[host].words([sys.executable, "-m", "oserve.cli", *words]),
            env=self.env,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )

    def end_server(self, number: signal.Signals) -> None:
        """Signal it, and wait."""
        assert self.server is not None
        for pid in self.hosts[0].processes("oserve.cli", "serve"):
            os.kill(pid, number)
        self.server.wait(timeout=LIMIT_S)

    # -- clients --------------------------------------------------------------------------------
    @asynccontextmanager
    async def client(self, number: int = 0) -> AsyncIterator[aiohttp.ClientSession]:
        """A client on a host, of the gateway there."""
        connector = aiohttp.TCPConnector(socket_factory=lambda _: socket_on(self.hosts[number]))
        async with aiohttp.ClientSession(self.url, connector=connector) as session:
            yield session

    async def until(self, true: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Ask for the status until it is so."""
        document: dict[str, Any] = {}
        async with self.client() as session:
            try:
                async with asyncio.timeout(LIMIT_S):
                    while True:
                        async with session.get("/oserve/v1/status") as answer:
                            document = await answer.json()
                        if true(document):
                            return document
                        await asyncio.sleep(0.1)
            except TimeoutError:
                raise AssertionError(f"{json.dumps(document)[:4000]}\n{self.logs()}") from None


def wait(true: Callable[[], bool], process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline_s = time.monotonic() + LIMIT_S
    while not true():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline_s, log.read_text()
        time.sleep(0.05)


def states(document: dict[str, Any]) -> dict[str, str]:
    return {one["name"]: one["state"] for one in document.get("nodes", ())}


def whole(document: dict[str, Any]) -> bool:
    """Every replica is ready on nodes that are up, by a server's own word."""
    alive = {one["id"]: one["phase"] for one in document["replicas"] if one["phase"] != "gone"}
    return (
        alive == {"one": "ready", "two": "ready", "both": "ready"}
        and states(document) == {"host1": "up", "host2": "up"}
        and "controller_away_s" not in document
    )


def pids(document: dict[str, Any]) -> dict[str, int]:
    return {one["id"]: one["pid"] for one in document["replicas"] if one["phase"] == "ready"}


# -- clients --------------------------------------------------------------------------------------
STREAM = {**BODY, "prompt": "go on", "max_tokens": 150, "stream": True}


async def streamed(session: aiohttp.ClientSession) -> tuple[str, str, float]:
    """One stream: its text, its first replica, and its longest gap (s)."""
    text, gap_s, last_s = "", 0.0, time.monotonic()
    async with session.post("/v1/completions", json=STREAM) as answer:
        assert answer.status == 200, await answer.text()
        replica = answer.headers["x-oserve-replica"]
        lines = []
        async for line in answer.content:
            if line.startswith(b"data: "):
                now_s = time.monotonic()
                gap_s, last_s = max(gap_s, now_s - last_s), now_s
                lines.append(line[6:].strip())
    assert lines, "an empty stream"
    assert lines[-1] == b"[DONE]", lines[-3:]
    for line in lines[:-1]:
        event = json.loads(line)
        assert "error" not in event, event
        text += "".join(choice["text"] for choice in event["choices"])
    return text, replica, gap_s


@dataclass
class Load:
    """Streams without a break, ``width`` at a time; each must have the text that all have.

    ``number``: the host whose gateway they go to.
    """

    scene: Scene
    text: str
    number: int = 0
    width: int = 4
    served: int = 0
    began: set[str] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)
    gap_s: float = 0.0

    async def _run(self) -> None:
        async with self.scene.client(self.number) as session:
            while True:
                try:
                    text, replica, gap_s = await streamed(session)
                except (aiohttp.ClientError, AssertionError) as error:
                    self.wrong.append(repr(error)[:2000])
                    continue
                if text != self.text:
                    self.wrong.append(f"{replica}: {text!r}")
                self.served += 1
                self.gap_s = max(self.gap_s, gap_s)

    async def more(self, count: int) -> None:
        """Wait until so many more streams have ended well."""
        wanted = self.served + count
        async with asyncio.timeout(LIMIT_S):
            while self.served < wanted and not self.wrong:  # noqa: ASYNC110
                await asyncio.sleep(0.05)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(self._run()) for _ in range(self.width)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def load_on(scene: Scene) -> Load:
    """A load whose text is known."""
    async with scene.client() as session:
        text, _, _ = await streamed(session)
    return Load(scene, text)
