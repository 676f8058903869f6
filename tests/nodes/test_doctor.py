"""Two nodes examined through two hatches on the loopback, and the command."""

import asyncio
import dataclasses
import importlib
import json
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from examiners import examining_keeper
from hatches import running_hatch
from oserve.cli import app
from oserve.nodes import examiner, visit
from oserve.nodes.checks import NodeVerdict, judge
from oserve.nodes.directory import ClusterNode
from oserve.nodes.doctor import examine_nodes
from oserve.nodes.examination import MachineFacts, NodeExamination
from oserve.nodes.links import measure_link

MACHINE = MachineFacts(oserve="1", cores=1)


async def test_two_nodes_and_one_that_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examiner, "examine_machine", lambda _model: MACHINE)
    monkeypatch.setattr(visit, "SILENCE_S", 0.0)
    started: list[str] = []
    async with (
        running_hatch(tmp_path) as one,
        running_hatch(tmp_path) as other,
        examining_keeper(one, started),
        examining_keeper(other, started),
    ):
        nodes = {
            "a": ClusterNode(name="a", hatch=one.address),
            "b": ClusterNode(name="b", hatch=other.address),
            "c": ClusterNode(name="c", refused="it does not answer"),
        }
        found = await examine_nodes(nodes, limit_s=0.01)
    a, b, c = found
    assert len(started) == 2
    assert a.machine == b.machine == MACHINE
    assert a.clock is not None
    [there], [back] = a.links, b.links
    assert (there.target, back.target) == ("b", "a")
    assert there.bytes_per_s > 0 < there.round_trip_s
    assert back.bytes_per_s == 0 < back.round_trip_s
    assert c.unreached == "it does not answer"
    # What is shown names no token, certificate or address.
    shown = msgspec.json.encode((found, judge(found))).decode()
    for secret in (one.address.token, "BEGIN CERTIFICATE", "127.0.0.1", str(one.address.port)):
        assert secret not in shown


async def test_a_link_that_is_refused(tmp_path: Path) -> None:
    async with running_hatch(tmp_path) as one:
        address = dataclasses.replace(one.address, token="wrong")
        link = await asyncio.to_thread(measure_link, "b", address, bandwidth=True, limit_s=0.01)
    assert "cut the connection off" in link.error


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    machine = msgspec.structs.replace(
        MACHINE, engine="1", cores=8, shared_memory_bytes=1 << 31, open_files=1 << 20
    )
    for changed, strict, code in (
        ({}, True, 0),
        ({"cores": 1}, False, 0),
        ({"cores": 1}, True, 1),
        ({"shared_memory_bytes": 1}, False, 2),
    ):
        facts = msgspec.structs.replace(machine, **changed)
        found = [NodeExamination(node="local", machine=facts)]
        monkeypatch.setattr(
            importlib.import_module("oserve.cli.doctor"), "examine_here", lambda _m, f=found: f
        )
        arguments = ["doctor", *(["--strict"] if strict else [])]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == code, result.output
        assert "local" in result.output
        told = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).output)
        assert told["verdict"] in set(NodeVerdict)
        assert {"node", "check", "verdict", "found", "remedy"} == set(told["findings"][0])
    assert list(tmp_path.iterdir()) == []
