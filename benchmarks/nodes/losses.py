"""What the loss of each part of a Ray cluster costs clients, and how fast it is made up for.

    python benchmarks/nodes/losses.py [--events calm,agent,...] [--json FILE] [--log FILE]
    python benchmarks/nodes/losses.py --json FILE --print

Three hosts of Linux namespaces (as root), real Ray, real engines of the tiny model: the head of
Ray, ``oserve serve --cluster ray:HOST:6379`` and the clients are on host 0, engines on hosts 1 and
2, one replica over both. Clients have greedy streams of tokens running; then one thing ends:

    agent, raylet, helper     kill -9; nothing is started again by hand
    head                      kill -9 of Ray's GCS, whose state is in RocksDB; started again
    server                    kill -9 of ``oserve serve``; started again
    cable, plugged            host 2 is off the network; it is back, and Ray started again there
    power, back               every process of host 2 is killed; it and Ray are started again

Told are streams that were lost or refused, tokens that differ
from those of the same request before the event (by id, place by place), the longest gap of a
stream (its first token included), and seconds until the server noticed, until it had decided on a
plan for the nodes in use, and until every replica of the plan that these nodes can hold was ready.
``--json`` adds the rows to a file, ``--print`` only prints its table.
"""

import argparse
import asyncio
import json
import re
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from e2e.node_scene import pids, states, whole
from e2e.ray_scene import AGENT, GCS, HELPER, RAYLET, RayScene, ray_scene
from hosts import unavailable
from oserve.engines.tiny import make_tiny_model

# Without tensor parallelism: its ranks wait for each other in a busy loop, which two cores for
# everything do not bear.
PLAN = """
id: losses
workload_types: [{name: all}]
replicas:
  - id: one
    shape: {precision: fp32, max_num_batched_tokens: 256, max_num_seqs: 16}
    devices: [host1/cpu:0]
  - id: two
    shape: {precision: fp32, max_num_batched_tokens: 512, max_num_seqs: 8}
    devices: [host2/cpu:0]
  - id: both
    shape:
      {pipeline_parallel_size: 2, precision: fp32, max_num_batched_tokens: 128, max_num_seqs: 8}
    devices: [host1/cpu:1, host2/cpu:1]
routing_shares: {all: {one: 0.4, two: 0.3, both: 0.3}}
"""
PROMPTS = 4
TOKENS = 160
# A client begins a stream so often, or when its last one has ended.
PERIOD_S = 2.0
QUIET_S = 8.0
AFTER_S = 6.0
LOOK_S = 0.05
ALL_LIMIT_S = 5.0
LIMIT_S = 200.0
SETTINGS = (
    *("--set", "control.mode=auto", "--set", "planning.objective=capacity"),
    *("--set", "control.decision_interval_s=900"),
)


@dataclass
class Row:
    """What one event has cost; ``None``: there was nothing of the kind."""

    event: str
    streams: int = 0
    lost: int = 0
    changed_tokens: int = 0
    gap_before_s: float = 0.0
    gap_s: float = 0.0
    noticed_s: float | None = None
    planned_s: float | None = None
    whole_s: float | None = None
    notes: list[str] = field(default_factory=list)


# -- clients --------------------------------------------------------------------------------------
async def tokens_of(
    session: aiohttp.ClientSession, index: int, gaps: list[tuple[float, float]], began: list[str]
) -> list[int]:
    """The token ids of one stream; its gaps over 0.1 s are added, with the time of their end.

    Raises OSError or aiohttp.ClientError if it is refused or breaks off.
    """
    body = {
        **{"model": "tiny", "prompt": f"story {index}: ", "max_tokens": TOKENS, "stream": True},
        **{"temperature": 0, "ignore_eos": True, "return_token_ids": True},
    }
    found: list[int] = []
    done, last_s = False, time.monotonic()
    try:
        async with session.post("/v1/completions", json=body) as answer:
            if answer.status != 200:
                raise aiohttp.ClientError(f"{answer.status}: {(await answer.text())[:300]}")
            began.append(answer.headers["x-oserve-replica"])
            async for line in answer.content:
                if not line.startswith(b"data: "):
                    continue
                now_s = time.monotonic()
                if now_s - last_s > 0.1:
                    gaps.append((now_s, now_s - last_s))
                last_s = now_s
                done = done or line.strip() == b"data: [DONE]"
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise aiohttp.ClientError(json.dumps(event)[:300])
                    for choice in event["choices"]:
                        found += choice.get("token_ids") or []
    finally:
        # A stream that breaks has waited, too.
        now_s = time.monotonic()
        if not done and now_s - last_s > 0.1:
            gaps.append((now_s, now_s - last_s))
    if not done:
        raise aiohttp.ClientError("it broke off")
    return found


def differing(tokens: list[int], wanted: list[int]) -> int:
    """Places at which two answers differ, tokens that only one has included."""
    same = sum(a == b for a, b in zip(tokens, wanted, strict=False))
    return max(len(tokens), len(wanted)) - same


class Clients:
    """Streams of some prompts, again and again, whose tokens are known."""

    def __init__(self, scene: RayScene) -> None:
        self._scene = scene
        self._wanted: list[list[int]] = []
        self._ending = False
        self.running: dict[int, list[str]] = {}
        self.gaps: list[tuple[float, float]] = []
        self.streams = 0
        self.changed_tokens = 0
        self.lost: list[str] = []

    async def learn(self) -> None:
        """Ask for each prompt alone."""
        async with self._scene.client() as session:
            for index in range(PROMPTS):
                self._wanted.append(await tokens_of(session, index, [], []))
                assert len(self._wanted[-1]) == TOKENS

    @asynccontextmanager
    async def streaming(self, count: int) -> AsyncIterator[None]:
        """So many clients until the context ends; their last streams are waited for."""
        self._ending = False
        tasks = [asyncio.create_task(self._client(number, count)) for number in range(count)]
        try:
            yield
            self._ending = True
            async with asyncio.timeout(LIMIT_S):
                await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _client(self, number: int, count: int) -> None:
        await asyncio.sleep(PERIOD_S * number / count)
        async with self._scene.client() as session:
            for turn in range(10_000):
                if self._ending:
                    return
                began_s = time.monotonic()
                index = (number + turn * count) % PROMPTS
                began = self.running[number] = []
                try:
                    tokens = await tokens_of(session, index, self.gaps, began)
                    self.changed_tokens += differing(tokens, self._wanted[index])
                except (aiohttp.ClientError, OSError, TimeoutError) as error:
                    self.lost.append(f"{began}: {error!r}"[:400])
                finally:
                    del self.running[number]
                self.streams += 1
                await asyncio.sleep(max(0.05, PERIOD_S - (time.monotonic() - began_s)))

    def gap_s(self, since_s: float, until_s: float = float("inf")) -> float:
        """The longest gap of those that ended in this time."""
        return max((gap for at_s, gap in self.gaps if since_s <= at_s < until_s), default=0.0)

    async def on(self, *replicas: str) -> None:
        """Wait until each of these has the beginning of a stream under way, or at least one."""
        began_s = time.monotonic()
        while True:
            found = {one for item in self.running.values() for one in item} & set(replicas)
            late_s = time.monotonic() - began_s
            if len(found) == len(replicas) or (found and late_s > ALL_LIMIT_S):
                return
            if late_s > LIMIT_S:
                raise SystemExit(f"no stream began on {replicas}")
            await asyncio.sleep(0.005)


def say(words: str) -> None:
    print(time.strftime("%H:%M:%S"), words, file=sys.stderr, flush=True)


def cpu_times() -> list[int]:
    line = Path("/proc/stat").read_text().partition("\n")[0]
    return [int(word) for word in line.split()[1:]]


def idle_share(before: list[int]) -> float:
    """The idle share of the machine's CPU time since then."""
    spent = [now - then for now, then in zip(cpu_times(), before, strict=True)]
    return (spent[3] + spent[4]) / max(1, sum(spent))


# -- what the server says -------------------------------------------------------------------------
@dataclass(frozen=True)
class View:
    """The status, and the server's log since the watch began."""

    document: dict[str, Any]
    log: str


class Watch:
    """Looks at status and log often; ``seen`` measures from the construction on."""

    def __init__(self, scene: RayScene) -> None:
        self._scene = scene
        self._log = scene.log_file
        self._skip = self._log.stat().st_size
        self.began_s = time.monotonic()
        self.document: dict[str, Any] = {}

    async def seen(self, true: Callable[[View], bool], what: str) -> float:
        """Seconds until it was so."""
        async with self._scene.client() as session:
            while True:
                try:
                    limit = aiohttp.ClientTimeout(total=1.0)
                    async with session.get("/oserve/v1/status", timeout=limit) as answer:
                        self.document = await answer.json()
                except (aiohttp.ClientError, TimeoutError):
                    pass
                with self._log.open("rb") as file:
                    file.seek(self._skip)
                    log = file.read().decode(errors="replace")
                passed_s = time.monotonic() - self.began_s
                if true(View(self.document, log)):
                    return passed_s
                if passed_s > LIMIT_S:
                    raise SystemExit(f"not seen: {what}\n{self.document}\n{self._scene.logs()}")
                await asyncio.sleep(LOOK_S)


def full(view: View) -> bool:
    """Every replica that the nodes in use can hold is ready, by a server's own word."""
    document = view.document
    barred = {
        one["name"] for one in document.get("nodes", ()) if one["state"] in {"lost", "held_down"}
    }
    wanted = [
        one
        for one in document.get("replicas", ())
        if not any(device.split("/")[0] in barred for device in one["devices"])
        and not (one["note"] == "not in the plan" or one["phase"] == "draining")
    ]
    return (
        bool(wanted)
        and all(one["phase"] == "ready" for one in wanted)
        and "controller_away_s" not in document
    )


def settled(document: dict[str, Any]) -> bool:
    """All nodes are in use, and every replica of the plan is ready."""
    return set(states(document).values()) == {"up"} and full(View(document, ""))


def on_node_2(document: dict[str, Any]) -> list[str]:
    """Replicas that the loss of node 2 ends."""
    return [
        one["id"]
        for one in document.get("replicas", ())
        if one["phase"] == "ready" and any(d.startswith("host2/") for d in one["devices"])
    ]


def decided(view: View) -> bool:
    return re.search(r"decision \d+ \(node\)", view.log) is not None


def carried_out(view: View) -> bool:
    """The last decision is carried out: if it was for another plan, that plan serves."""
    _, made, since = view.log.rpartition(" (node): ")
    if not made:
        return False
    return (
        not since.startswith("switch") or re.search(r"switch \S+: (commit|done)", since) is not None
    )


def lost(view: View) -> bool:
    return states(view.document).get("host2") == "lost"


# -- events ---------------------------------------------------------------------------------------
@dataclass
class Stage:
    """A scene under load, and the row that an event fills."""

    scene: RayScene
    clients: Clients
    row: Row

    def said(self, words: str) -> Callable[[View], bool]:
        return lambda view: words in view.log

    async def processes_other(self, host: int, words: str, before: list[int]) -> float:
        began_s = time.monotonic()
        while self.scene.hosts[host].processes(words) in ([], before):
            if time.monotonic() - began_s > LIMIT_S:
                raise SystemExit(f"nothing runs {words} again\n{self.scene.logs()}")
            await asyncio.sleep(LOOK_S)
        return time.monotonic() - began_s


async def calm(stage: Stage) -> None:
    await asyncio.sleep(AFTER_S)


async def agent(stage: Stage) -> None:
    before = stage.scene.hosts[2].processes(AGENT)
    stage.scene.hosts[2].kill(AGENT)
    again_s = await stage.processes_other(2, AGENT, before)
    stage.row.notes.append(f"another agent after {again_s:.1f} s")


async def raylet(stage: Stage) -> None:
    watch = Watch(stage.scene)
    stage.scene.hosts[2].kill(RAYLET)
    stage.row.noticed_s = await watch.seen(stage.said("host2 serves on"), "the node serves on")
    began_s = time.monotonic()
    await asyncio.to_thread(stage.scene.ray.start, 2)
    await watch.seen(stage.said("node host2 is up with"), "Ray has the node again")
    stage.row.notes.append(f"Ray has the node {time.monotonic() - began_s:.1f} s after its restart")


async def head(stage: Stage) -> None:
    watch = Watch(stage.scene)
    stage.scene.hosts[0].kill(GCS)
    stage.row.noticed_s = await watch.seen(stage.said("nothing is heard of Ray"), "silence")
    began_s = time.monotonic()
    await asyncio.to_thread(stage.scene.ray.start, 0)
    await watch.seen(stage.said("Ray is heard again"), "Ray is back")
    stage.row.notes.append(f"Ray is heard {time.monotonic() - began_s:.1f} s after its restart")


async def helper(stage: Stage) -> None:
    watch = Watch(stage.scene)
    stage.scene.hosts[0].kill(HELPER)
    stage.row.noticed_s = await watch.seen(stage.said("nothing is heard of Ray"), "silence")
    again_s = await watch.seen(stage.said("Ray is heard again"), "another helper")
    stage.row.notes.append(f"Ray is heard again after {again_s:.1f} s")


async def server(stage: Stage) -> None:
    scene = stage.scene
    before = pids(await scene.until(settled))
    watch = Watch(scene)
    await asyncio.to_thread(scene.end_server, signal.SIGKILL)
    stage.row.noticed_s = await watch.seen(
        lambda view: "controller_away_s" in view.document, "the gateways miss it"
    )
    await asyncio.sleep(2.0)
    began_s = time.monotonic()
    await asyncio.to_thread(scene.serve, *SETTINGS)
    same = pids(await scene.until(settled)) == before
    stage.row.notes.append(f"all taken over {time.monotonic() - began_s:.1f} s after its restart")
    stage.row.notes.append("same engines" if same else "ENGINES WERE REPLACED")


async def gone(stage: Stage, act: Callable[[], None]) -> None:
    """Node 2 goes."""
    watch = Watch(stage.scene)
    row = stage.row
    _, row.noticed_s, row.planned_s, row.whole_s = await asyncio.gather(
        # To end every process of a host takes a moment.
        asyncio.to_thread(act),
        watch.seen(stage.said("node host2 is down"), "host2 is down"),
        watch.seen(decided, "a decision"),
        watch.seen(lambda view: lost(view) and carried_out(view) and full(view), "a whole plan"),
    )
    row.notes.append(plan_of(watch.document))


def plan_of(document: dict[str, Any]) -> str:
    there = sorted(one["id"] for one in document["replicas"] if one["phase"] == "ready")
    return f"plan {document['plan_id']}: {', '.join(there)}"


async def returned(stage: Stage, act: Callable[[], None]) -> None:
    """Node 2 is back."""
    watch, row = Watch(stage.scene), stage.row
    _, row.noticed_s, row.planned_s, row.whole_s = await asyncio.gather(
        asyncio.to_thread(act),
        watch.seen(
            lambda view: states(view.document).get("host2") in {"held_down", "up"}, "a sign"
        ),
        watch.seen(decided, "a decision"),
        watch.seen(
            lambda view: (
                states(view.document).get("host2") == "up" and carried_out(view) and full(view)
            ),
            "a whole plan",
        ),
    )
    row.notes.append(plan_of(watch.document))


async def cable(stage: Stage) -> None:
    await gone(stage, lambda: stage.scene.hosts.pull_cable(2))


async def plugged(stage: Stage) -> None:
    def act() -> None:
        stage.scene.hosts.plug_cable(2)
        # Its raylet learns that it counts as dead, and ends.
        stage.scene.reach(lambda: not stage.scene.hosts[2].processes(RAYLET))
        stage.scene.ray.start(2)

    await returned(stage, act)


async def power(stage: Stage) -> None:
    await gone(stage, stage.scene.hosts[2].cut_power)


async def back(stage: Stage) -> None:
    def act() -> None:
        stage.scene.hosts.power_on(2)
        stage.scene.ray.start(2)

    await returned(stage, act)


EVENTS: dict[str, Callable[[Stage], Awaitable[None]]] = {
    step.__name__: step
    for step in (calm, agent, helper, raylet, head, server, cable, plugged, power, back)
}
# These have no scene without the event before them.
FOLLOWS = {"plugged": "cable", "back": "power"}
TOLD = {
    "calm": "none",
    "agent": "agent killed",
    "raylet": "raylet killed",
    "head": "Ray's head killed, started again",
    "helper": "Ray helper killed",
    "server": "server killed, started again",
    "cable": "cable of a node pulled",
    "plugged": "its cable back",
    "power": "power cut of a node",
    "back": "the node back",
}


async def measured(scene: RayScene, events: list[str], streams: int) -> AsyncIterator[Row]:
    """One event after the other, under load; each begins when all replicas of the plan are up."""
    await scene.until(whole)
    say("all replicas are ready")
    clients = Clients(scene)
    await clients.learn()
    async with clients.streaming(streams):
        await asyncio.sleep(QUIET_S / 2)
        for event in events:
            before, quiet_s = cpu_times(), time.monotonic()
            await asyncio.sleep(QUIET_S / 2)
            say(f"{idle_share(before):.0%} of the CPU is idle; next: {TOLD[event]}")
            row = Row(event=event, gap_before_s=clients.gap_s(quiet_s))
            count, changed, failed = clients.streams, clients.changed_tokens, len(clients.lost)
            if event not in FOLLOWS:
                await clients.on(*on_node_2(await scene.until(settled)))
            began_s = time.monotonic()
            await EVENTS[event](Stage(scene, clients, row))
            await asyncio.sleep(AFTER_S)
            row.streams = clients.streams - count
            row.lost = len(clients.lost) - failed
            row.changed_tokens = clients.changed_tokens - changed
            row.gap_s = clients.gap_s(began_s)
            row.notes += clients.lost[failed:]
            say(json.dumps(asdict(row)))
            yield row


def logs(folder: Path) -> str:
    files = sorted(file for file in folder.rglob("*.log") if file.is_file())
    kept = [file for file in files if "session_" not in str(file)]
    return "\n".join(f"== {file}\n{file.read_text(errors='replace')}" for file in kept)


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| event | streams | lost | tokens changed | longest gap before, since | noticed "
        "| new plan | full capacity |",
        "|" + "---|" * 8,
    ]
    for row in rows:
        times = [row[name] for name in ("noticed_s", "planned_s", "whole_s")]
        told = ["-" if value is None else f"{value:.1f} s" for value in times]
        lines.append(
            f"| {TOLD[row['event']]} | {row['streams']} | {row['lost']} | {row['changed_tokens']} "
            f"| {row['gap_before_s']:.2f}, {row['gap_s']:.2f} s | {' | '.join(told)} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", default=",".join(EVENTS))
    parser.add_argument("--streams", type=int, default=4, help="clients; each has one stream")
    parser.add_argument("--json", type=Path, help="add the rows to this file")
    parser.add_argument("--print", action="store_true", help="only print what is in the file")
    parser.add_argument("--log", type=Path, help="write all logs to this file")
    arguments = parser.parse_args()
    events = arguments.events.split(",")
    if unknown := set(events) - EVENTS.keys():
        parser.error(f"no such event: {', '.join(sorted(unknown))}; there are {', '.join(EVENTS)}")
    for index, event in enumerate(events):
        if event in FOLLOWS and events[max(0, index - 1)] != FOLLOWS[event]:
            parser.error(f"{event} follows {FOLLOWS[event]}")
    if reason := unavailable():
        parser.error(f"no hosts can be made: {reason}")
    known: dict[str, Any] = {}
    if arguments.json and arguments.json.exists():
        known = json.loads(arguments.json.read_text())
    # So that it leaves nothing behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if not arguments.print:
        asyncio.run(run(arguments, events, known))
    print(table([known[name] for name in TOLD if name in known]))
    return 0


async def run(arguments: argparse.Namespace, events: list[str], known: dict[str, Any]) -> None:
    """Measure, and add to what is known."""
    with tempfile.TemporaryDirectory(prefix="oserve-losses-") as name:
        folder = Path(name)
        make_tiny_model(folder / "tiny")
        (folder / "plan.yaml").write_text(PLAN)
        try:
            with ray_scene(folder, slots=2) as scene:
                say("Ray is up")
                scene.serve(*SETTINGS)
                async for row in measured(scene, events, arguments.streams):
                    known[row.event] = asdict(row)
                    if arguments.json:
                        arguments.json.write_text(json.dumps(known, indent=1))
                scene.end_server(signal.SIGINT)
        finally:
            if arguments.log:
                arguments.log.write_text(logs(folder))


if __name__ == "__main__":
    sys.exit(main())
