"""Replicas of several parts, in real vLLM engines on CPU: exact, and tied together.

The parts have addresses of their own on the loopback interface, so that nothing of one is reached
by the other's.
"""

import asyncio
import contextlib
import os
import shutil
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import pytest_asyncio

from oserve.core import Endpoint, Precision, ReplicaPart, ReplicaShape, ReplicaSpec, parts_of
from oserve.engines.arguments import (
    NodeInterface,
    Rendezvous,
    engine_arguments,
    engine_cores,
    engine_environment,
    part_arguments,
    runs_eagerly,
)
from oserve.engines.control import EngineControl
from oserve.engines.devices import split_cores
from oserve.engines.group import group_activity, group_members
from oserve.engines.parts_process import PartEndedError, PartsProcess, start_parts
from oserve.engines.ports import MasterPorts
from oserve.engines.probe import Probe
from oserve.engines.rank_commands import ListenerReply, OpenListener
from oserve.engines.settings import EngineSettings
from oserve.engines.spawner import Launcher
from oserve.engines.watched import OwnProcess, WatchedProcess

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

LIMIT_S = 300.0
PROMPTS = [[5] * 20, [72, 101, 108] * 9, list(range(60, 120))]
INTERFACES = {
    "here": NodeInterface(address="127.0.0.1", name="lo"),
    "a": NodeInterface(address="127.0.0.2", name="lo"),
    "b": NodeInterface(address="127.0.0.3", name="lo"),
}
SETTINGS = EngineSettings(kv_cache_memory_bytes=32 << 20, max_model_len=512)


@dataclass
class Running:
    process: WatchedProcess
    endpoint: Endpoint
    folders: list[Path]

    async def answers(self) -> list[str]:
        async with EngineControl(self.endpoint) as engine:
            return [await engine.complete("tiny", prompt, 16, 60) for prompt in PROMPTS]


Start = Callable[..., Awaitable[Running]]


def spec_of(tp: int, pp: int) -> ReplicaSpec:
    shape = ReplicaShape(
        tensor_parallel_size=tp,
        pipeline_parallel_size=pp,
        precision=Precision.FP32,
        max_num_batched_tokens=256,
        max_num_seqs=8,
    )
    return ReplicaSpec(id="r", shape=shape, devices=tuple(f"cpu:{i}" for i in range(tp * pp)))


@pytest_asyncio.fixture(loop_scope="session")
async def start(
    zygote: Launcher, tiny_model: Path, nothing_is_left: Path, tmp_path: Path
) -> AsyncIterator[Start]:
    """Starts a replica whose stages are dealt to these nodes, and waits until it serves."""
    begun: list[WatchedProcess] = []
    made: list[Path] = []
    ports = MasterPorts()

    async def start(tp: int, pp: int, *nodes: str) -> Running:
        spec = spec_of(tp, pp)
        share = len(spec.devices) // len(nodes)
        cores = split_cores(sorted(os.sched_getaffinity(0)), len(spec.devices))
        devices = {
            device.id: replace(device, node=nodes[number // share])
            for number, device in enumerate(cores)
        }
        parts = parts_of(spec, devices)
        folders = [nothing_is_left / f"{len(begun)}{part.node}" for part in parts]
        for folder in folders:
            folder.mkdir(mode=0o700)
            made.append(folder)
        endpoint = Endpoint(unix_socket=str(folders[0] / "api.sock"))
        whole = engine_arguments(
            spec,
            model=str(tiny_model),
            served_model_name="tiny",
            unix_socket=endpoint.unix_socket,
            platform="cpu",
            settings=SETTINGS,
        )
        leader = INTERFACES[parts[0].node].address
        meeting = Rendezvous(address=leader, port=ports.take(leader))

        async def one(part: ReplicaPart) -> WatchedProcess:
            several = len(parts) > 1
            environment = engine_environment(
                part.devices,
                platform="cpu",
                local_model=True,
                eager=runs_eagerly(whole),
                folder=str(folders[part.index]),
                keep_weights=True,
                interface=INTERFACES[part.node] if several else None,
            )
            words = part_arguments(whole, part, meeting, platform="cpu") if several else whole
            log = tmp_path / f"{folders[part.index].name}.log"
            process = await zygote.start(words, environment, engine_cores(part.devices), log)
            return OwnProcess(process, log, group_activity)

        process = await start_parts(parts, one)
        begun.append(process)
        probe = Probe(endpoint, timeout_s=5.0)
        ended = asyncio.ensure_future(process.wait())
        async with asyncio.timeout(LIMIT_S):
            while not await probe.healthy():
                assert not ended.done(), await process.cause()
                await asyncio.sleep(0.05)
        await probe.close()
        ended.cancel()
        return Running(process, endpoint, folders)

    yield start
    for process in begun:
        process.kill()
        with contextlib.suppress(PartEndedError):
            await process.wait()
    for folder in made:
        shutil.rmtree(folder, ignore_errors=True)


async def test_answers_are_those_of_one_machine(start: Start) -> None:
    one = await start(1, 1, "here")
    expected = await one.answers()
    one.process.kill()
    await one.process.wait()
    two = await start(1, 2, "a", "b")
    assert await two.answers() == expected
    # Commands reach the ranks of all nodes, in order; the paths that they tell are their nodes'.
    async with EngineControl(two.endpoint) as engine:
        replies = await engine.command(OpenListener(), ListenerReply)
    told = [Path(reply.address) for reply in replies]
    assert told == [folder / f"w{rank}.sock" for rank, folder in enumerate(two.folders)]
    assert all(path.is_socket() for path in told)


async def test_ranks_of_a_node_are_neighbours(start: Start) -> None:
    """Two ranks on each node: tensor parallel inside, stages across."""
    one = await start(2, 1, "here")
    expected = await one.answers()
    one.process.kill()
    await one.process.wait()
    four = await start(2, 2, "a", "b")
    assert await four.answers() == expected


@pytest.mark.parametrize("victim", [0, 1])
async def test_one_part_dies_and_all_end(start: Start, victim: int) -> None:
    two = await start(1, 2, "a", "b")
    assert isinstance(two.process, PartsProcess)
    groups = [part.pid for part in two.process.processes]
    os.killpg(groups[victim], signal.SIGKILL)
    named = rf"part {victim + 1} of 2 \(node {'ab'[victim]}, rank {victim}\) ended by SIGKILL"
    async with asyncio.timeout(LIMIT_S):
        with pytest.raises(PartEndedError, match=named):
            await two.process.wait()
    assert [group_members(group) for group in groups] == [[], []]
