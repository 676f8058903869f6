"""A server tunes its constants on its own records, in a worker process of low priority.

In mode ``advise`` the outcome is logged. In mode ``auto`` it comes into force with the next routing
table and is on trial from then on; see ``control.retuning``.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np

from oserve.control.decision import Mode
from oserve.control.dispatch.constants import DispatchConstants
from oserve.control.retuning import (
    Attainment,
    RetuningPolicy,
    RetuningState,
    changed,
    due,
    is_barred,
    looked,
)
from oserve.core import Clock, DeploymentPlan, Device, FinishStatus, OServeError, RequestRecord
from oserve.evaluate.part_score import ScoredServing
from oserve.evaluate.simulator import SimulatedTraffic, Simulator, traffic_from
from oserve.evaluate.tuning import Constant, changes, value_of
from oserve.evaluate.tuning_run import TuningChoice, TuningRun, is_pooled, run_tuning
from oserve.evaluate.worker_process import WorkerProcess
from oserve.gateway.records import newest_record, read_records, slo_counts
from oserve.perf.corrected import Speeds, corrected
from oserve.perf.table import PerformanceSource
from oserve.traces import Slo, TraceRequest

_log = logging.getLogger("oserve.tuning")

_INTERVAL_S = 10.0
# The search reads so many of the last records; that bounds its time and memory.
_MOST_RECORDS = 20_000
# Without a request for so long the earlier ones are of another time.
_GAP_S = 900.0
# Attainment before a change: of the requests that arrived within this time.
_BEFORE_S = 3600.0
# Requests are recorded when they end; those that arrived later than this may still run.
_LAG_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningFacts:
    """What does not change while a server runs.

    ``demotes_by_s``: the TTFT by which late requests are demoted. ``ordered``: engines take
    priorities.
    """

    mode: Mode
    records: Path
    source: PerformanceSource
    context: int
    devices: tuple[Device, ...]
    slo: Slo
    demotes_by_s: float | None
    ordered: bool
    policy: RetuningPolicy
    min_gain: float


class Records(Protocol):
    """What the records of a server tell. Calls block; make them in a thread."""

    def newest(self) -> int:
        """The number of the newest record; 0 without any."""
        ...

    def attained(self, start_s: float, end_s: float) -> Attainment:
        """The attainment of requests that arrived between two Unix times."""
        ...


class StoredRecords:
    """The records in a file, judged by an SLO."""

    def __init__(self, path: Path, slo: Slo) -> None:
        self._path = path
        self._slo = slo

    def newest(self) -> int:
        """See ``Records``."""
        return newest_record(self._path)

    def attained(self, start_s: float, end_s: float) -> Attainment:
        """See ``Records``."""
        slo = self._slo
        requests, met = slo_counts(
            self._path, ttft_s=slo.ttft_s, tpot_s=slo.tpot_s, start_s=start_s, end_s=end_s
        )
        return Attainment(requests=requests, met=met)


class ConstantSearch(Protocol):
    """The search for better constants. Calls block; make them in a thread."""

    def __call__(
        self, present: DispatchConstants, plan: DeploymentPlan, speeds: Speeds
    ) -> TuningRun:
        """Search on the last records; raises OServeError if there are too few."""
        ...

    def close(self) -> None:
        """End a search that runs."""
        ...


class TuningProcess:
    """The search in a worker process."""

    def __init__(self, facts: TuningFacts) -> None:
        self._worker = WorkerProcess(partial(_held, facts))

    def __call__(
        self, present: DispatchConstants, plan: DeploymentPlan, speeds: Speeds
    ) -> TuningRun:
        """See ``ConstantSearch``."""
        return self._worker.call(tuned_on_records, present, plan, speeds)

    def close(self) -> None:
        """See ``ConstantSearch``."""
        self._worker.close()


def _held(facts: TuningFacts) -> TuningFacts:
    return facts


def tuned_on_records(
    facts: TuningFacts, present: DispatchConstants, plan: DeploymentPlan, speeds: Speeds
) -> TuningRun:
    """Tune a plan's constants on the last records; raises OServeError if there are too few."""
    kinds = {device.id: device.kind for device in facts.devices}
    located = tuple(
        replace(spec, shape=replace(spec.shape, device_kind=kinds[spec.devices[0]]))
        for spec in plan.replicas
        if spec.devices
    )
    if len(located) < len(plan.replicas):
        raise OServeError(
            "a replica of the plan is attached, so the plan cannot be simulated",
            place="control.tune",
            remedy="set it to off",
        )
    served = replace(plan, replicas=located)
    return run_tuning(
        Simulator(corrected(facts.source, speeds)),
        recent_traffic(read_records(facts.records, last=_MOST_RECORDS), facts.context),
        TuningChoice(
            present=present,
            serving=ScoredServing(plan=served, slo=facts.slo, ordered=facts.ordered),
            pooled=is_pooled(served),
            ttft_s=facts.demotes_by_s,
            min_gain=facts.min_gain,
            place=str(facts.records),
        ),
    )


def recent_traffic(records: Iterable[RequestRecord], context: int) -> SimulatedTraffic:
    """The completed requests since the last long pause, in order of arrival, from 0 s."""
    rows: list[RequestRecord] = sorted(
        (
            row
            for row in records
            if row.status is FinishStatus.COMPLETED and row.prompt_tokens and row.output_tokens
        ),
        key=lambda row: row.arrival_s,
    )
    arrivals = np.array([row.arrival_s for row in rows])
    pauses = np.flatnonzero(np.diff(arrivals) > _GAP_S)
    rows = rows[int(pauses[-1]) + 1 :] if len(pauses) else rows
    requests = [
        TraceRequest(
            arrival_s=row.arrival_s - rows[0].arrival_s,
            prompt_tokens=row.prompt_tokens,
            output_tokens=row.output_tokens,
        )
        for row in rows
    ]
    return traffic_from(requests, max_model_len=context)


class ConstantsAsGiven:
    """No tuning: the constants of the settings stay in force."""

    def __init__(self, constants: DispatchConstants) -> None:
        self.constants = constants

    async def run(
        self, plan: Callable[[], DeploymentPlan], speeds: Callable[[], Speeds] = Speeds
    ) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""

    def document(self) -> dict[str, Any]:
        """See ``BackgroundTuning``."""
        return {"mode": Mode.OFF.value}


class BackgroundTuning:
    """Searches now and then, and watches what it changed.

    ``save`` keeps the state for the next server; ``unix_s`` is the wall clock. Its errors are
    logged: serving continues with the constants in force.
    """

    def __init__(
        self,
        facts: TuningFacts,
        state: RetuningState,
        *,
        search: ConstantSearch,
        records: Records,
        clock: Clock,
        unix_s: Callable[[], float],
        save: Callable[[RetuningState], None],
    ) -> None:
        self.state = state
        self._facts = facts
        self._search = search
        self._records = records
        self._clock = clock
        self._unix_s = unix_s
        self._save = save
        self._seen: int | None = None

    @property
    def constants(self) -> DispatchConstants:
        """The constants in force."""
        return self.state.present

    async def run(
        self, plan: Callable[[], DeploymentPlan], speeds: Callable[[], Speeds] = Speeds
    ) -> None:
        """Run until cancelled; ``plan`` and ``speeds`` give those in force."""
        while True:
            await self._clock.sleep(_INTERVAL_S)
            await self.attempt(plan(), speeds())

    async def attempt(self, plan: DeploymentPlan, speeds: Speeds) -> None:
        """One step, whose errors are logged."""
        try:
            await self.step(plan, speeds)
        except OServeError as error:
            await self._tell(f"no search: {error.message}", self._unix_s())
        # An unforeseen fault of the search must not end serving.
        except Exception:
            _log.exception("tuning failed")

    async def step(self, plan: DeploymentPlan, speeds: Speeds) -> None:
        """Look at the trial, or search if that is due."""
        now_s = self._unix_s()
        trial = self.state.trial
        if trial is not None:
            after = await self._attained(trial.began_s, now_s - _LAG_S)
            await self._put(looked(self.state, after, self._facts.policy, now_s=now_s))
            return
        newest = await asyncio.to_thread(self._records.newest)
        if self._seen is None:
            self._seen = newest
        new = newest - self._seen
        if not due(self.state, self._facts.policy, new_records=new, now_s=now_s):
            return
        self._seen = newest
        await self._put(msgspec.structs.replace(self.state, searched_s=now_s))
        run = await asyncio.to_thread(self._search, self.state.present, plan, speeds)
        await self._found(run)

    async def _found(self, run: TuningRun) -> None:
        now_s = self._unix_s()
        tuned = run.tuned
        words = difference(self.state.present, tuned.constants)
        gain = f"{tuned.held_out_gain.mean:+.1%} on {run.requests[1]} requests held out"
        if not tuned.promoted:
            await self._tell(f"nothing better in {tuned.candidates} candidates", now_s)
        elif is_barred(self.state, tuned.constants, now_s=now_s):
            await self._tell(f"not again, taken back before: {words} ({gain})", now_s)
        elif self._facts.mode is Mode.ADVISE:
            await self._tell(f"would change {words} ({gain})", now_s)
        else:
            before = await self._attained(now_s - _BEFORE_S, now_s - _LAG_S)
            await self._put(changed(self.state, tuned.constants, before, now_s=now_s))
            await self._tell(f"changed {words} ({gain}); on trial", now_s)

    async def _attained(self, start_s: float, end_s: float) -> Attainment:
        return await asyncio.to_thread(self._records.attained, start_s, max(start_s, end_s))

    async def _tell(self, line: str, now_s: float) -> None:
        await self._put(msgspec.structs.replace(self.state, line=line, line_s=now_s))

    async def _put(self, state: RetuningState) -> None:
        if state == self.state:
            return
        if state.line and (state.line, state.line_s) != (self.state.line, self.state.line_s):
            _log.info("tuning: %s", state.line)
        self.state = state
        await asyncio.to_thread(self._save, state)

    def close(self) -> None:
        """End a search that runs."""
        self._search.close()

    def document(self) -> dict[str, Any]:
        """The part of the status document about tuning."""
        state = self.state
        return {
            "mode": self._facts.mode.value,
            "constants": {name.value: value_of(state.present, name) for name in Constant},
            "changed": [name.value for name in changes(state.given, state.present)],
            "on_trial": state.trial is not None,
            "line": state.line,
            "line_s": state.line_s,
        }


def difference(before: DispatchConstants, after: DispatchConstants) -> str:
    """What changes, in words."""
    return ", ".join(
        f"{name.value} {_shown(value_of(before, name))} to {_shown(value_of(after, name))}"
        for name in changes(before, after)
    )


def _shown(value: Any) -> str:
    return "unset" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
