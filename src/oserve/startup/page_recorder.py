"""Records what the page shows: sections each second, a point of the charts every ten.

It sees what is published for the status API, and reads request records in a thread. The points are
in the state store, so that the last hour is there again after a restart. A fault here ends nothing.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from oserve.core import OServeError
from oserve.core.faults import fault
from oserve.gateway.process.hub import OperatorCallHandler
from oserve.gateway.process.messages import OperatorAnswer, OperatorCall
from oserve.gateway.process.reports import MetricSums
from oserve.gateway.records import newest_record, ran_between, records_after
from oserve.gateway.snapshot import ClusterSnapshot
from oserve.look.feed import HISTORY_PATH
from oserve.look.points import (
    MOST_POINTS,
    MOST_RECORDS,
    POINT_S,
    WINDOW_S,
    PageLimits,
    PagePoint,
    PageRecent,
    PointHistory,
    RecordWindow,
)
from oserve.look.sections import PageState, page_state
from oserve.look.switches import SeenSwitch, SwitchLog, SwitchOutcomeSeen
from oserve.startup.store import StateStore, StateUpdate
from oserve.startup.switch_judge import SwitchJudge

_PAGE_POINT_DECODER = msgspec.json.Decoder(PagePoint)

_log = logging.getLogger("oserve.look")

_SECTIONS_S = 1.0
_SAVED = "page_switches"
# Records are written some tenths of a second after their requests end.
_LATE_S = 2.0


class PageRecorder:
    """Adds the page to each snapshot. ``unix_s``: Unix time in seconds.

    ``records``: the record store's file; ``longest_s``: no request takes longer. ``judge``: tells
    what switches brought, ``None``: nobody does.
    """

    def __init__(
        self,
        *,
        records: Path,
        state_file: Path,
        limits: PageLimits,
        longest_s: float,
        judge: SwitchJudge | None = None,
        unix_s: Callable[[], float] = time.time,
    ) -> None:
        self._records, self._longest_s, self._unix_s = records, longest_s, unix_s
        self._judge = judge
        self._store = StateStore(state_file)
        self._window, self._slo = RecordWindow(limits), limits.ms
        now_s = unix_s()
        saved = self._store.points(after_s=now_s - POINT_S * MOST_POINTS)
        self._history = PointHistory(_PAGE_POINT_DECODER.decode(item) for item in saved)
        self._switches = SwitchLog(self._store.saved(_SAVED, list[SeenSwitch]) or ())
        self._recent: PageRecent | None = None
        self._newest = newest_record(records)
        self._sampled_s = self._pointed_s = 0.0
        self._before: Mapping[str, float] = {}
        self._page = msgspec.Raw(b"{}")
        self._task: asyncio.Task[None] | None = None
        self._judging: asyncio.Task[None] | None = None
        self._first = True

    def sampled(
        self, snapshot: ClusterSnapshot, metrics: Callable[[], MetricSums]
    ) -> ClusterSnapshot:
        """The snapshot with the page's sections, which change once a second."""
        now_s = self._unix_s()
        if now_s - self._sampled_s >= _SECTIONS_S:
            self._sampled_s = now_s
            try:
                self._sample(snapshot, metrics(), now_s)
            # An unforeseen fault of the page must not end serving.
            except Exception as error:
                _log.error("the page cannot be made: %s", fault(error))
        return msgspec.structs.replace(snapshot, page=self._page)

    def answering(self, operate: OperatorCallHandler) -> OperatorCallHandler:
        """Answers gateway processes that ask for the last hour; the rest goes to ``operate``."""

        async def answered(call: OperatorCall) -> OperatorAnswer:
            if call.path == HISTORY_PATH:
                points = list(self._history.points)
                return OperatorAnswer(status=200, body=msgspec.json.encode(points))
            return await operate(call)

        return answered

    # -- each second ----------------------------------------------------------------------------
    def _sample(self, snapshot: ClusterSnapshot, metrics: MetricSums, now_s: float) -> None:
        status = msgspec.json.decode(snapshot.status)
        reports = msgspec.json.decode(snapshot.switches)
        totals = totals_of(metrics)
        state = page_state(status, reports, totals, now_s=now_s, slo=self._slo)
        seen = self._switches.observe(state.switches)
        self._page = msgspec.Raw(self._encoded(state, seen))
        if now_s - self._pointed_s >= POINT_S and (self._task is None or self._task.done()):
            self._pointed_s = now_s
            self._task = asyncio.ensure_future(self._point(state, totals, now_s))

    def _encoded(self, state: PageState, seen: list[SeenSwitch]) -> bytes:
        """The sections; those that the window brings are added."""
        document: dict[str, Any] = {name: getattr(state, name) for name in state.__struct_fields__}
        document["switches"] = [item.document() for item in seen]
        document["recent"] = self._recent
        document["point"] = self._history.points[-1] if self._history.points else None
        return msgspec.json.encode(document)

    # -- every ten seconds ----------------------------------------------------------------------
    async def _point(self, state: PageState, totals: Mapping[str, float], now_s: float) -> None:
        try:
            self._newest, found, outcomes = await asyncio.to_thread(self._read, now_s)
            self._window.add(found)
            self._switches.learn(outcomes)
            forecast = {
                item.name: (item.now_rps, item.expected_rps, item.low_rps, item.high_rps)
                for item in state.types
            }
            point = PagePoint(
                at_s=round(now_s, 1),
                types=self._window.types(now_s, forecast),
                queued=state.now.queued,
                demoted=self._since("demoted", totals),
                shed=self._since("shed", totals),
                power_w=state.now.power_w,
                joules_per_token=state.now.joules_per_token,
                load=state.now.load,
            )
            self._before = totals
            self._recent = self._window.recent(now_s)
            self._history.add(point)
            encoded = self._encoded(state, self._switches.observe(()))
            await asyncio.to_thread(self._save, point, encoded)
            if self._judge is not None and (self._judging is None or self._judging.done()):
                self._judging = asyncio.ensure_future(self._judged(self._judge, now_s))
        except Exception as error:  # as above
            _log.error("a point of the page cannot be made: %s", fault(error))

    async def _judged(self, judge: SwitchJudge, now_s: float) -> None:
        due = self._switches.to_judge(now_s)
        if due is None:
            return
        found = None
        try:
            found = await asyncio.to_thread(judge.judge, due.plan, due.start_s, due.end_s)
        except Exception as error:  # as above
            _log.error("a switch cannot be judged: %s", fault(error))
        if found is None:
            self._switches.judged(due, None, None, None)
        else:
            self._switches.judged(due, found.kept, found.by_old, found.by_new)

    def _read(self, now_s: float) -> tuple[int, list[Any], dict[str, SwitchOutcomeSeen]]:
        """New records, and those of switches that have ended; runs in a thread."""
        after = self._newest
        if self._first:
            # What ended just before this server began belongs to the window, too.
            after, self._first = max(0, after - MOST_RECORDS), False
        newest, found = records_after(self._records, after, most=MOST_RECORDS)
        outcomes = {}
        for item in self._switches.unknown():
            if now_s < item.ended_s + _LATE_S:
                continue
            ran = ran_between(self._records, item.began_s, item.ended_s, longest_s=self._longest_s)
            outcomes[item.id] = SwitchOutcomeSeen(
                requests=ran.requests, moves=ran.moves, lost=ran.failed
            )
        since_s = now_s - WINDOW_S
        fresh = [record for record in found if record.arrival_s + record.e2e_s > since_s]
        return newest, fresh, outcomes

    def _save(self, point: PagePoint, state: bytes) -> None:
        self._store.save(
            StateUpdate(
                memory={_SAVED: msgspec.json.encode(self._switches.document())},
                page=((point.at_s, msgspec.json.encode(point), state),),
            )
        )

    def _since(self, name: str, totals: Mapping[str, float]) -> int:
        return max(0, round(totals.get(name, 0.0) - self._before.get(name, totals.get(name, 0.0))))


def totals_of(metrics: MetricSums) -> dict[str, float]:
    """Counters of the page, summed over their labels."""

    def total(name: str) -> float:
        return sum(numbers[0] for numbers in metrics.get(name, {}).values())

    ended = metrics.get("oserve_requests", {})
    return {
        "completed": ended.get("completed", [0.0])[0],
        "failed": ended.get("failed", [0.0])[0],
        "rejected": ended.get("rejected", [0.0])[0],
        "moved": total("oserve_requests_moved"),
        "retried": total("oserve_requests_retried"),
        "demoted": total("oserve_requests_demoted"),
        "shed": total("oserve_requests_shed"),
    }


def page_recorder(
    *,
    records: str,
    state_file: Path,
    limits: PageLimits,
    longest_s: float,
    judge: SwitchJudge | None,
) -> PageRecorder | None:
    """The recorder of a server; ``None``, with a line in the log, if it cannot keep anything."""
    try:
        return PageRecorder(
            records=Path(records),
            state_file=state_file,
            limits=limits,
            longest_s=longest_s,
            judge=judge,
        )
    except (OServeError, OSError) as error:
        _log.warning("there is no page: %s", error)
        return None
