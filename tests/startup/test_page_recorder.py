"""The recorder of the page: what it makes of snapshots and records, and what a restart leaves."""

import asyncio
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gateway.conftest import until
from look.scene import Fleet
from oserve.core import FinishStatus, RequestRecord
from oserve.gateway.process.messages import OperatorAnswer, OperatorCall
from oserve.gateway.records import RecordStore
from oserve.gateway.snapshot import ClusterSnapshot
from oserve.look.feed import HISTORY_PATH
from oserve.look.points import PageLimits
from oserve.startup.page_recorder import PageRecorder, page_recorder, totals_of

METRICS = {"oserve_requests": {"completed": [7.0], "failed": [1.0]}, "oserve_requests_demoted": {}}


class Scene:
    """A recorder on a clock of the test's, and what it records."""

    def __init__(self, folder: Path) -> None:
        self.fleet = Fleet()
        self.now_s = self.fleet.at_s
        self.records = folder / "records.sqlite"
        self.store = RecordStore(self.records, max_records=1000)
        self.folder = folder
        self.recorder = self.made()

    def made(self) -> PageRecorder:
        return PageRecorder(
            records=self.records,
            state_file=self.folder / "state.sqlite",
            limits=PageLimits(ttft_s=1.0),
            longest_s=60.0,
            unix_s=lambda: self.now_s,
        )

    def ended(self, count: int, **fields: Any) -> None:
        for _ in range(count):
            defaults: dict[str, Any] = {
                "arrival_s": self.now_s - 2.0,
                "prompt_tokens": 10,
                "output_tokens": 10,
                "workload_type": self.fleet.names[0],
                "replica": "r0",
                "ttft_s": 0.5,
                "tpot_s": 0.1,
                "e2e_s": 1.5,
                "status": FinishStatus.COMPLETED,
            }
            self.store.put(RequestRecord(**{**defaults, **fields}))

    def sample(self) -> dict[str, Any]:
        self.fleet.at_s = self.now_s
        switches = [self.fleet.switch] if self.fleet.switch is not None else []
        snapshot = ClusterSnapshot(
            status=msgspec.Raw(msgspec.json.encode(self.fleet.status())),
            switches=msgspec.Raw(msgspec.json.encode(switches)),
        )
        page = self.recorder.sampled(snapshot, lambda: METRICS).page
        found: dict[str, Any] = json.loads(bytes(page))
        return found

    async def point(self) -> None:
        """Another point, once it is made."""
        if self.recorder._task is not None:
            await self.recorder._task
        self.now_s += 10.0
        self.sample()
        task = self.recorder._task
        assert task is not None
        await task

    async def history(self) -> list[Any]:
        async def refuse(call: OperatorCall) -> OperatorAnswer:
            return OperatorAnswer(status=404, body=b"")

        answered = self.recorder.answering(refuse)
        assert (await answered(OperatorCall(path="/other", body=b""))).status == 404
        found: list[Any] = json.loads(
            (await answered(OperatorCall(path=HISTORY_PATH, body=b""))).body
        )
        return found


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


async def test_records_become_points(scene: Scene) -> None:
    scene.ended(3)
    scene.ended(1, ttft_s=2.0)
    scene.store.close()
    await scene.point()
    (point,) = await scene.history()
    ended, kept, *_ = point["types"][scene.fleet.names[0]]
    assert (ended, kept) == (4, 3)
    scene.now_s += 1.0
    page = scene.sample()
    assert page["recent"]["flow"] == [[0, 0, 4]]
    assert page["now"]["totals"]["completed"] == 7
    assert page["point"] == point
    assert page["slo"] == [1000.0, None]


async def test_the_hour_is_there_after_a_restart(scene: Scene) -> None:
    scene.ended(2)
    scene.store.close()
    for _ in range(3):
        await scene.point()
    before = await scene.history()
    scene.recorder = scene.made()
    assert await scene.history() == before
    # An hour later it is another hour.
    scene.now_s += 3601.0
    scene.recorder = scene.made()
    assert await scene.history() == []


async def test_a_switch_gets_its_outcome_from_records(scene: Scene) -> None:
    scene.fleet.begin_switch()
    scene.sample()
    began_s = scene.now_s
    while scene.fleet.next_phase() != "done":
        scene.now_s += 2.0
        scene.fleet.at_s = scene.now_s
    scene.ended(4, arrival_s=began_s + 1.0, moves=1)
    scene.ended(1, arrival_s=began_s + 1.0, status=FinishStatus.FAILED)
    scene.ended(5, arrival_s=began_s - 30.0)
    scene.store.close()
    await scene.point()
    scene.now_s += 1.0
    (switch,) = scene.sample()["switches"]
    assert switch["outcome"]["requests"] == 5
    assert switch["outcome"]["moves"] == 4
    assert switch["outcome"]["lost"] == 1
    # It stays with what was expected after a restart, which forgets the report.
    scene.fleet.switch = None
    scene.recorder = scene.made()
    (again,) = scene.sample()["switches"]
    assert again == switch


async def test_without_records_and_after_a_fault_the_server_goes_on(scene: Scene) -> None:
    scene.store.close()
    scene.records.unlink()
    await scene.point()
    assert len(await scene.history()) == 1
    scene.now_s += 1.0
    page = scene.recorder.sampled(ClusterSnapshot(status=msgspec.Raw(b"[]")), dict).page
    assert bytes(page) != b"{}"
    await until(lambda: len(asyncio.all_tasks()) == 1)


def test_without_a_place_for_it_there_is_no_page(tmp_path: Path) -> None:
    found = page_recorder(
        records=str(tmp_path / "records"),
        state_file=tmp_path / "missing" / "state.sqlite",
        limits=PageLimits(),
        longest_s=1.0,
        judge=None,
    )
    assert found is None


def test_totals_are_summed_over_labels() -> None:
    metrics = {"oserve_requests_moved": {"lost\treplay": [2.0], "failed\tmove": [3.0]}}
    assert totals_of(metrics)["moved"] == 5.0
