"""Nodes that lack the model get it from those that have it, and are held meanwhile."""

import asyncio
import contextlib
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examiners import examining_keeper
from hatches import running_hatch
from nodes.test_file_fetch import contents, make_model
from oserve.core import VirtualClock
from oserve.nodes import visit
from oserve.nodes.directory import ClusterNode
from oserve.nodes.examination import ModelFile
from oserve.nodes.fetch_messages import ModelHoldings
from oserve.nodes.holdings import spread_of
from oserve.nodes.model_fetch import ModelFetch

MODEL = "some/model"
REVISION = "0123456789abcdef"


def snapshot(cache: Path) -> Path:
    return cache / "models--some--model" / "snapshots" / REVISION


async def test_two_nodes_get_the_model_from_a_third(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(visit, "SILENCE_S", 0.0)
    monkeypatch.chdir(tmp_path)
    caches = {name: tmp_path / f"cache-{name}" for name in "abc"}
    make_model(snapshot(caches["a"]))
    refs = caches["a"] / "models--some--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text(REVISION)
    nodes: dict[str, ClusterNode] = {}
    clock = VirtualClock()
    fetch = ModelFetch([MODEL], lambda: nodes, clock)
    async with contextlib.AsyncExitStack() as stack:
        found = {}
        for name, cache in caches.items():
            hatch = await stack.enter_async_context(running_hatch(tmp_path))
            await stack.enter_async_context(examining_keeper(hatch, [], cache))
            found[name] = ClusterNode(name=name, hatch=hatch.address)
        nodes |= {name: found[name] for name in "ab"}
        assert fetch.lacks("a") is None
        fetch.begin()
        await until(clock, lambda: fetch.lacks("b") == "")
        assert fetch.lacks("a") == ""
        # One that comes later gets it from either.
        nodes["c"] = found["c"]
        assert fetch.lacks("c") is None
        fetch.refresh()
        await until(clock, lambda: fetch.lacks("c") == "")
        await until(clock, lambda: not fetch._visits)
        # One that was down is looked at again.
        del nodes["b"]
        fetch.refresh()
        await until(clock, lambda: fetch.lacks("b") is None)
        await fetch.close()
    for name in "bc":
        assert contents(snapshot(caches[name])) == contents(snapshot(caches["a"]))
        main = caches[name] / "models--some--model" / "refs" / "main"
        assert main.read_text() == REVISION


async def until(clock: VirtualClock, true: object) -> None:
    async with asyncio.timeout(60.0):
        while not true():  # type: ignore[operator]
            await clock.advance(1.0)
            await asyncio.sleep(0.002)


async def test_nodes_that_nobody_can_help_are_used_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(visit, "SILENCE_S", 0.0)
    monkeypatch.chdir(tmp_path)
    clock = VirtualClock()
    async with (
        running_hatch(tmp_path) as hatch,
        examining_keeper(hatch, [], tmp_path / "cache"),
    ):
        nodes = {"a": ClusterNode(name="a", hatch=hatch.address), "b": ClusterNode(name="b")}
        fetch = ModelFetch([MODEL], lambda: nodes, clock)
        fetch.begin()
        await until(clock, lambda: fetch.lacks("a") == "" == fetch.lacks("b"))
        await fetch.close()
    # Without a model to look for, nobody is visited.
    assert ModelFetch([], lambda: nodes, clock).lacks("a") == ""


# -- what nodes have, compared --------------------------------------------------------------------
FILES = {
    name: ModelFile(name=name, size_bytes=size, digest=f"{name}-1")
    for name, size in (("config.json", 1), ("model.safetensors", 100), ("vocab.json", 5))
}


def having(*names: str, other: bool = False) -> ModelHoldings:
    files = tuple(FILES[name] for name in sorted(names))
    if other:
        files = tuple(msgspec.structs.replace(file, digest="other") for file in files)
    return ModelHoldings(files=files, complete={"config.json", "model.safetensors"} <= set(names))


def test_who_has_who_lacks_and_who_has_another() -> None:
    spread = spread_of(
        {
            "whole": having(*FILES),
            "twin": having(*FILES),
            "old": having(*FILES, other=True),
            "half": having("model.safetensors"),
            "broken": having("config.json", other=True),
            "without": having("config.json", "model.safetensors"),
            "none": having(),
        }
    )
    assert spread.model == having(*FILES)
    assert spread.holders == {"whole", "twin"}
    assert spread.seekers == {"half", "none"}
    assert spread.strangers == {"old", "without"}
    assert spread.misfits == {"broken"}


@given(
    nodes=st.dictionaries(
        st.sampled_from("abcdefgh"),
        st.tuples(st.sets(st.sampled_from(sorted(FILES))), st.booleans()),
    )
)
def test_each_node_is_one_of_them(nodes: dict[str, tuple[set[str], bool]]) -> None:
    found = {name: having(*files, other=other) for name, (files, other) in nodes.items()}
    spread = spread_of(found)
    if not spread.holders:
        assert not any(item.complete for item in found.values())
        assert not spread.seekers
        return
    groups = (spread.holders, spread.seekers, spread.strangers, spread.misfits)
    assert sorted(name for group in groups for name in group) == sorted(found)
    # Nothing that a node has is replaced, and what it gets makes it whole.
    wanted = {file.name: file for file in spread.model.files}
    assert all(not found[name].complete for name in spread.seekers | spread.misfits)
    for name in spread.seekers:
        assert all(wanted.get(file.name, file) == file for file in found[name].files)
