"""A switch whose weights move from one node to another, under load.

    python benchmarks/nodes/switch.py [--layers 16] [--streams 2] [--rounds 2] [--json]

Two nodes on one machine: each a hatch process and a keeper, reached through its hatch alone. A
Llama of noise serves on node a; a switch moves it to two ranks on node b, and the next one back.
Meanwhile streams of greedy text run one after the other at whichever replica serves. Told are

- bytes on each link, as the hatches count them, and of the planned transfer,
- the rate from the first order to the last byte (beside it, the time that the slowest rank took),
  and that of a plain TCP copy before and after, both with the streams running,
- the longest gap between two chunks of a stream, before and during the switch,
- streams that broke off, and texts that differ from that of the engine loaded from disk.

Ranks, hatches, streams and the copies share the machine's cores.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp

# They lie beside this file, or in the next folder.
sys.path.insert(0, str(Path(__file__).parents[1] / "switch"))
from hatch import Node, machine, plain_copy_s  # type: ignore[import-not-found]
from mid_model import make_mid_model  # type: ignore[import-not-found]
from streams import BODY, Seen, Told  # type: ignore[import-not-found]

from oserve.config import plan_yaml
from oserve.config.settings import Settings
from oserve.control.loop import ControlLoop
from oserve.control.reconcile import ReconcilePolicy
from oserve.core import (
    DeploymentPlan,
    Endpoint,
    LengthClass,
    Precision,
    ReplicaPhase,
    ReplicaShape,
    ReplicaSpec,
)
from oserve.engines.clock import LiveClock
from oserve.engines.cluster import EngineCluster
from oserve.engines.connectors import connector_of
from oserve.engines.devices import split_cores
from oserve.engines.holding import HatchDial, HeldEngines
from oserve.engines.keeper import Keeper
from oserve.engines.mover import Mover
from oserve.engines.rank_commands import JobReport
from oserve.engines.settings import EngineSettings
from oserve.engines.spawner import ZygoteLauncher
from oserve.nodes.hatch_messages import HatchReport, ReportQuery, ask_hatch, tell_peers
from oserve.startup.switch_facts import switch_facts
from oserve.switching.engine_weights import EngineWeightFacts, EngineWeights
from oserve.switching.switcher import Switcher, SwitcherFacts
from oserve.switching.weights import Moved

LIMIT_S = 400.0
QUIET_S = 5.0
COPY_BYTES = 512 << 20


def plan_of(name: str, *devices: str) -> DeploymentPlan:
    shape = ReplicaShape(
        tensor_parallel_size=len(devices),
        precision=Precision.FP32,
        max_num_batched_tokens=256,
        max_num_seqs=4,
    )
    return DeploymentPlan(
        id=name,
        replicas=(ReplicaSpec(id=name, shape=shape, devices=devices),),
        length_classes=(LengthClass(name="all"),),
        routing_shares={"all": {name: 1.0}},
    )


class Streams(Seen):  # type: ignore[misc]
    """Streams one after the other, at the replica that serves."""

    def __init__(self, cluster: EngineCluster) -> None:
        super().__init__()
        self._cluster = cluster

    async def endpoint(self) -> Endpoint:
        while True:
            for state in (await self._cluster.observe()).replicas:
                if state.phase is ReplicaPhase.READY:
                    return state.endpoint
            await asyncio.sleep(0.01)

    async def one(self) -> Told:
        connector = connector_of(await self.endpoint())
        async with aiohttp.ClientSession(connector=connector) as session:
            told: Told = await self.ask(session, "http://engine", {**BODY, "model": "m"})
        return told

    async def keep_on(self) -> None:
        while True:
            told = await self.one()
            if not told.whole:
                await asyncio.sleep(0.1)


class World:
    """The nodes, the cluster on them, and a switcher."""

    def __init__(self, folder: Path, model: Path, first: DeploymentPlan) -> None:
        self.clock = LiveClock()
        self.nodes = {name: Node(folder, name) for name in "ab"}
        self._launcher = ZygoteLauncher(log_path=folder / "zygote.log")
        self._keepers = [
            Keeper(
                folder=node.folder,
                registry=folder / f"{name}.json",
                launcher=self._launcher,
                identity=name,
                grace_s=LIMIT_S,
            )
            for name, node in self.nodes.items()
        ]
        slots = split_cores(sorted(os.sched_getaffinity(0)), 2)
        devices = tuple(
            replace(slot, id=f"{name}/{slot.id}", node=name)
            for name in self.nodes
            for slot in slots
        )
        settings = Settings(
            model=str(model),
            state_dir=str(folder / "state"),
            engines=EngineSettings(kv_cache_memory_bytes=64 << 20, max_model_len=1024),
        )
        self.cluster = EngineCluster(
            devices,
            model=str(model),
            served_model_name="m",
            run_dir=folder / "run",
            clock=self.clock,
            settings=settings.engines,
            remote=[
                HeldEngines(HatchDial(name, node.address, clock=self.clock), grace_s=LIMIT_S)
                for name, node in self.nodes.items()
            ],
        )
        self.loop = ControlLoop(
            self.cluster, self.clock, first, policy=ReconcilePolicy(), interval_s=0.2
        )
        self.moved: list[Moved] = []
        # By the ranks' own clocks: of the move, then of the checksums.
        self.ranks_s: list[float] = []
        self._settings = settings
        self.switcher = Switcher(
            SwitcherFacts(
                folder=folder / "switches",
                movable=switch_facts(settings, devices),
                cluster=self.cluster,
                loop=self.loop,
                clock=self.clock,
                settle=lambda _outcome: None,
                publish=self._publish,
                weights=partial(EngineWeights, self._weights()),
                plan_text=plan_yaml,
                unix_s=time.time,
                transfer_limit_s=settings.switch.transfer_limit_s,
            )
        )
        self._tasks: list[asyncio.Task[None]] = []

    def _weights(self) -> EngineWeightFacts:
        moved, ranks_s, clock = self.moved, self.ranks_s, self.clock

        class Watched(Mover):
            async def move(self, *words: Any, **more: Any) -> Moved:
                ranks_s.clear()
                moved.append(await super().move(*words, **more))
                return moved[-1]

            async def _reports(self, *words: Any, **more: Any) -> list[JobReport]:
                reports = await super()._reports(*words, **more)
                ranks_s.append(max(report.seconds for report in reports))
                return reports

        def mover(
            endpoints: Mapping[str, Endpoint], /, *, node_of: Callable[[str, int], str]
        ) -> Mover:
            return Watched(endpoints, clock, node_of=node_of)

        return EngineWeightFacts(
            cluster=self.cluster,
            model="m",
            mover=mover,
            transfer_limit_s=LIMIT_S,
            max_perplexity_rise=0.05,
        )

    async def _publish(self) -> None:
        await self.loop.step()

    async def start(self) -> None:
        a, b = self.nodes["a"].address, self.nodes["b"].address
        await tell_peers(a, {"b": b})
        await tell_peers(b, {"a": a})
        await self._launcher.prepare()
        self._tasks += [asyncio.create_task(keeper.run()) for keeper in self._keepers]
        for node in self.nodes.values():
            while not (node.folder / "keeper.sock").exists():  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        await self.cluster.adopt()
        self._tasks.append(asyncio.create_task(self.loop.run()))

    async def close(self) -> None:
        self._tasks.pop().cancel()
        await self.cluster.close()
        for keeper in self._keepers:
            keeper.stop(patient=False)
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._launcher.close()
        for node in self.nodes.values():
            node.close()

    async def sent_bytes(self) -> dict[str, int]:
        """Bytes that ranks of one node have sent to the other, by link."""
        found: dict[str, int] = {}
        for name, node in self.nodes.items():
            report = await ask_hatch(node.address, ReportQuery())
            assert isinstance(report, HatchReport)
            found |= {f"{name} -> {to}": size for to, size in report.sent_bytes.items()}
        return found


async def _copy() -> float:
    """Bytes/s of a plain TCP copy between two processes, now."""
    return float(COPY_BYTES / await asyncio.to_thread(plain_copy_s, COPY_BYTES))


async def switched(world: World, streams: Streams, plan: DeploymentPlan) -> dict[str, Any]:
    """One switch, from quiet to quiet."""
    quiet_s = time.time()
    await asyncio.sleep(QUIET_S)
    gap_before_s = streams.longest_gap_s(quiet_s, time.time())
    rates, sent = [await _copy()], await world.sent_bytes()
    begun_s = time.time()
    report = world.switcher.want(plan, "benchmark")
    async with asyncio.timeout(LIMIT_S):
        while world.switcher.active:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    ended_s = time.time()
    assert report.state == "done", report
    after = await world.sent_bytes()
    rates.append(await _copy())
    moved, plain = world.moved[-1], sum(rates) / len(rates)
    rate = moved.size_bytes / moved.seconds
    return {
        "to": plan.id,
        "seconds": ended_s - begun_s,
        "phases_s": dict(report.durations_s(0)),
        "bytes_by_link": {way: size - sent.get(way, 0) for way, size in after.items()},
        "planned_bytes": report.total_bytes,
        "moved_in_s": moved.seconds,
        "ranks_took_s": world.ranks_s[0],
        "bytes_per_s": rate,
        "plain_tcp_bytes_per_s": rates,
        "share_of_plain_tcp": rate / plain,
        "gap_before_s": gap_before_s,
        "gap_during_s": streams.longest_gap_s(begun_s, ended_s),
    }


async def measured(folder: Path, model: Path, streams: int, rounds: int) -> dict[str, Any]:
    plans = [plan_of("near", "a/cpu:0"), plan_of("far", "b/cpu:0", "b/cpu:1")]
    world = World(folder, model, plans[0])
    await world.start()
    load = Streams(world.cluster)
    known = (await load.one()).text
    tasks = [asyncio.create_task(load.keep_on()) for _ in range(streams)]
    rows = []
    for number in range(rounds):
        rows.append(await switched(world, load, plans[1 - number % 2]))
        print(_line(rows[-1]), flush=True)
    await asyncio.sleep(QUIET_S)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await world.close()
    return {
        "rows": rows,
        "streams": len(load.texts),
        "broken": load.failed,
        "differed": sum(text != known for text in load.texts),
    }


def _line(row: dict[str, Any]) -> str:
    links = ", ".join(f"{way} {size / 1e6:.0f} MB" for way, size in row["bytes_by_link"].items())
    plain = ", ".join(f"{rate / 1e6:.0f}" for rate in row["plain_tcp_bytes_per_s"])
    phases = ", ".join(f"{name} {took:.1f}" for name, took in row["phases_s"].items())
    return (
        f"to {row['to']}: {row['seconds']:.1f} s ({phases}); {links}; moved in "
        f"{row['moved_in_s']:.2f} s (ranks {row['ranks_took_s']:.2f} s): "
        f"{row['bytes_per_s'] / 1e6:.0f} MB/s, plain TCP {plain} MB/s: "
        f"{row['share_of_plain_tcp']:.2f}; longest gap {row['gap_before_s']:.2f} -> "
        f"{row['gap_during_s']:.2f} s"
    )


def main() -> None:
    """Entry point."""
    multiprocessing.set_start_method("fork")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--streams", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    print(machine(), flush=True)
    with tempfile.TemporaryDirectory(prefix="s") as name:
        folder = Path(name)
        model = make_mid_model(folder / "m", layers=chosen.layers)
        document = asyncio.run(measured(folder, model, chosen.streams, chosen.rounds))
    if chosen.json:
        print(json.dumps(document, indent=2))
    else:
        print(f"{document['streams']} streams: {document['broken']} broken, ", end="")
        print(f"{document['differed']} of another text")


if __name__ == "__main__":
    main()
