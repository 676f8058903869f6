"""A past hour on the page."""

import json
from datetime import datetime
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from look.scene import START_S, Fleet
from oserve.cli import app
from oserve.cli.look import saved_moments
from oserve.core import OServeError
from oserve.look.replay import ReplaySource
from oserve.startup.store import StateStore, StateUpdate


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two hours of a fleet."""
    path = tmp_path_factory.mktemp("saved") / "state.sqlite"
    store = StateStore(path)
    fleet = Fleet(nodes=1)
    rows = []
    for _ in range(720):
        fleet.advance(10.0)
        point = msgspec.json.encode(fleet.history.points[-1])
        rows.append((fleet.at_s, point, fleet.document()))
    store.save(StateUpdate(memory={}, page=rows))
    return path


async def test_the_last_hour_is_played(saved: Path) -> None:
    moments, start_s = saved_moments(saved, None)
    assert start_s == START_S + 3600.0
    clock = Clock()
    source = ReplaySource(moments, start_s=start_s, speed=10.0, now=clock)
    state = json.loads(source.state())
    assert (state["now"]["at_s"], state["replay"]) == (start_s, 10)
    # The hour before is its history.
    history = json.loads(await source.history())
    assert len(history) == 360
    assert history[-1]["at_s"] == start_s
    clock.now_s = 30.0
    assert json.loads(source.state())["now"]["at_s"] == start_s + 300.0
    clock.now_s = 1e6
    assert json.loads(source.state())["now"]["at_s"] == START_S + 7200.0
    assert source.away_s() == 0.0


def test_another_time_can_be_chosen(saved: Path) -> None:
    text = datetime.fromtimestamp(START_S + 60.0).isoformat()
    moments, start_s = saved_moments(saved, text)
    assert start_s == START_S + 60.0
    assert moments[0].at_s == START_S + 10.0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["2020-01-01T00:00"], "choose a time from"),
        (["noon"], "write it as"),
    ],
)
def test_a_wrong_time_is_refused(saved: Path, words: list[str], told: str) -> None:
    with pytest.raises(OServeError) as refused:
        saved_moments(saved, words[0])
    assert told in refused.value.remedy


def test_a_file_without_a_page_is_refused(tmp_path: Path) -> None:
    for file in (tmp_path / "none", tmp_path / "empty.sqlite"):
        if file.name != "none":
            StateStore(file)
        found = CliRunner().invoke(app, ["look", str(file)])
        assert isinstance(found.exception, OServeError)
        assert "state.sqlite" in found.exception.remedy
