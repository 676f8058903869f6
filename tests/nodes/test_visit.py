"""Examiners that are never visited end, too."""

import asyncio
from pathlib import Path

import pytest

from examiners import examining_keeper
from hatches import running_hatch
from oserve.nodes import examiner, visit
from oserve.nodes.directory import ClusterNode
from oserve.nodes.doctor import examine_nodes
from oserve.nodes.examination import ExaminerOrders
from oserve.nodes.visit import NodeVisit


async def test_an_examiner_that_was_never_reached_is_ended_by_its_visitor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = []

    async def never(_orders: ExaminerOrders, _cache: Path | None) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    monkeypatch.setattr(examiner, "serve_examiner", never)
    monkeypatch.setattr(visit, "SILENCE_S", 0.0)
    monkeypatch.setattr(visit, "_START_S", 0.2)
    started: list[str] = []
    async with running_hatch(tmp_path) as hatch, examining_keeper(hatch, started):
        node = NodeVisit(ClusterNode(name="a", hatch=hatch.address), purpose="fetch")
        with pytest.raises(TimeoutError):
            await node.begin()
        await node.end()
        assert ended == [True] * len(started)
        await node.end()


async def test_a_keeper_that_says_nothing_holds_no_visitor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(visit, "_GREETING_S", 0.2)
    left = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        left.set()
        writer.close()

    async with running_hatch(tmp_path) as hatch, asyncio.timeout(30.0):
        server = await asyncio.start_unix_server(silent, str(hatch.folder / "keeper.sock"))
        [found] = await examine_nodes({"a": ClusterNode(name="a", hatch=hatch.address)})
        assert found.unreached == "it did not answer in time"
        await left.wait()
        server.close()


async def test_an_examiner_ends_if_nobody_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examiner, "_VISITOR_S", 0.01)
    orders = ExaminerOrders(socket=str(tmp_path / "fetch" / "api.sock"), limit_s=86400.0)
    async with asyncio.timeout(30.0):
        await examiner.serve_examiner(orders, tmp_path)
    assert not (tmp_path / "fetch").exists()
