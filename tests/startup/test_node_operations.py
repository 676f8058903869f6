"""Operators' words about nodes: over HTTP's body, in memory, and on the command line."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from oserve.cli import app as cli
from oserve.cli import node as node_commands
from oserve.control.loop import ControlLoop
from oserve.control.reconcile import ReconcilePolicy
from oserve.core import (
    DeploymentPlan,
    Device,
    LengthClass,
    OServeError,
    ReplicaShape,
    ReplicaSpec,
    VirtualClock,
)
from oserve.sim import Phases, SimulatedCluster
from oserve.startup.node_operations import NodeOperations

DEVICES = tuple(Device(id=f"n{n}/d", kind="x", node=f"n{n}") for n in range(2))


def plan() -> DeploymentPlan:
    return DeploymentPlan(
        id="p",
        replicas=tuple(
            ReplicaSpec(id=f"r{n}", shape=ReplicaShape(), devices=(device.id,))
            for n, device in enumerate(DEVICES)
        ),
        length_classes=(LengthClass(name="all"),),
        routing_shares={},
    )


def control_loop() -> tuple[ControlLoop, VirtualClock]:
    clock = VirtualClock()
    cluster = SimulatedCluster(DEVICES, clock, phases=Phases(start_s=0.0))
    return ControlLoop(cluster, clock, plan(), policy=ReconcilePolicy()), clock


def body(action: str, node: str = "") -> bytes:
    return msgspec.json.encode({"action": action, "node": node})


async def test_a_drained_node_is_empty_and_stays_so_after_a_restart(tmp_path: Path) -> None:
    loop, clock = control_loop()
    nodes = NodeOperations(tmp_path, loop, replaces=False)
    await loop.step()
    await clock.advance(0.5)
    (_, second) = (await nodes.answer(body("drain", "n1"), None))["nodes"]
    assert (second["state"], second["replicas"]) == ("draining", ["r1"])
    for _ in range(12):
        nodes.observe(await loop.look())
        await loop.step()
        await clock.advance(0.5)
    observation = await loop.look()
    nodes.observe(observation)
    first, second = (await nodes.answer(body("list"), observation))["nodes"]
    assert (first["replicas"], second["replicas"]) == (["r0"], [])
    loop, clock = control_loop()
    nodes = NodeOperations(tmp_path, loop, replaces=False)
    nodes.observe(await loop.look())
    await loop.step()
    await clock.advance(0.5)
    observation = await loop.look()
    assert [state.spec.id for state in observation.replicas] == ["r0"]
    await nodes.answer(body("uncordon", "n1"), observation)
    await loop.step()
    assert len((await loop.look()).replicas) == 2


async def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    loop, _ = control_loop()
    (tmp_path / "nodes.json").write_text('{"nodes": 3}', encoding="utf-8")
    nodes = NodeOperations(tmp_path, loop, replaces=True)
    observation = await loop.look()
    for wrong in (body("cordon", "n7"), body("burn", "n1"), b"{", body("drain")):
        with pytest.raises(OServeError):
            await nodes.answer(wrong, observation)


def test_the_command_waits_until_the_node_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    left = [["r1", "r2"], ["r2"], []]

    def call(_url: str, path: str, *, body: bytes, **_: Any) -> bytes:
        assert path == "/oserve/v1/nodes"
        asked.append(json.loads(body))
        node = {
            "name": "n1",
            "state": "draining",
            "state_s": 1.0,
            "word": "draining",
            "held_down_s": 0.0,
            "silent_s": 0.0,
            "losses": 1,
            "reason": "",
            "devices": 2,
            "replicas": left[0] if len(left) == 1 else left.pop(0),
        }
        return msgspec.json.encode({"nodes": [node]})

    monkeypatch.setattr(node_commands, "call", call)
    monkeypatch.setattr(node_commands, "_POLL_S", 0.0)
    result = CliRunner().invoke(cli, ["node", "drain", "n1"])
    assert result.exit_code == 0, result.output
    assert [item["action"] for item in asked] == ["drain", "list", "list"]
    result = CliRunner().invoke(cli, ["node", "list"])
    assert "lost 1 time(s)" in result.output
    left[:] = [["r1"]]
    hours = SimpleNamespace(monotonic=iter(range(0, 9000, 900)).__next__, sleep=lambda _: None)
    monkeypatch.setattr(node_commands, "time", hours)
    result = CliRunner().invoke(cli, ["node", "drain", "n1"])
    assert isinstance(result.exception, OServeError)
