"""Policies of one or several scenes side by side, on several processes.

The result is the same for any number of processes: each one searches all settings that it needs.
"""

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np

from oserve.evaluate.attainment import ATTAINMENT, attainment
from oserve.evaluate.simulator import (
    largest_scale,
)
from oserve.sim.results import FleetResults
from oserve.sim.types import Status
from oserve.study.groups import TenantRow, TierRow, tenant_rows, tier_rows
from oserve.study.ours import OServeTuner
from oserve.study.policies import POLICIES
from oserve.study.policy import Policy
from oserve.study.run import Run, deployment_of
from oserve.study.runner import run_policy
from oserve.study.scene import Scene

_TOLERANCE = 0.01
_EVALUATIONS = 14
# Quantiles and moments that are kept for charts.
QUANTILES = (*(round(0.01 * step, 2) for step in range(100)), 0.995, 0.999, 1.0)
_MOMENTS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareOptions:
    """What to measure of each policy. ``capacity``: also its largest rate scale.

    ``sweep``: further scales for attainment and P99, as factors of ``scale``. ``knee``: run at this
    multiple of the capacity of static-best, in place of ``scale``.
    """

    scale: float = 1.0
    knee: float | None = None
    capacity: bool = True
    sweep: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """A policy at one rate."""

    rate_scale: float
    slo_attainment: float
    p50_e2e_s: float
    p99_e2e_s: float
    goodput_rps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One policy in one scene. Latencies are of completed requests, attainment is of all.

    ``lost`` counts requests that never completed, ``replayed`` how often one started over.
    ``quantiles`` (of TTFT, TPOT, E2E in seconds) and ``queue`` (moment, requests that wait for
    their first token) are for pictures. ``tiers`` and ``tenants``: results of each.
    """

    policy: str
    deployment: tuple[tuple[str, int], ...]
    levers: dict[str, Any]
    p50_e2e_s: float
    p99_e2e_s: float
    p50_ttft_s: float
    p99_ttft_s: float
    p50_tpot_s: float
    p99_tpot_s: float
    throughput_rps: float
    goodput_rps: float
    slo_attainment: float
    max_rate_scale: float | None
    device_hours: float
    energy_joules: float
    switches: int
    lost: int
    replayed: int
    changes: tuple[tuple[float, tuple[tuple[str, int], ...]], ...]
    quantiles: dict[str, tuple[float, ...]]
    queue: tuple[tuple[float, int], ...]
    points: tuple[CurvePoint, ...]
    tiers: tuple[TierRow, ...] = ()
    tenants: tuple[TenantRow, ...] = ()


def evaluate(tuner: OServeTuner, name: str, wish: CompareOptions) -> Row:
    """Search a policy's settings, run it, and find its capacity."""
    scene, simulator = tuner.scene, tuner.simulator
    scale = wish.scale if wish.knee is None else wish.knee * tuner.best.scale
    policy = POLICIES[name].make(tuner)
    run = run_policy(scene, policy, simulator, scale)
    most = _capacity(tuner, policy, scale) if wish.capacity else None
    points = [_point(scene, run, scale)]
    for factor in wish.sweep:
        at = scale * factor
        points.append(_point(scene, run_policy(scene, policy, simulator, at), at))
    return _row(scene, policy, name, run, most, points)


def _capacity(tuner: OServeTuner, policy: Policy, start: float) -> float:
    scene = tuner.scene

    def holds(scale: float) -> bool:
        run = run_policy(scene, policy, tuner.simulator, scale, judge_only=True)
        return not run.failed_early and attainment(run.results, scene.slo) >= ATTAINMENT

    return largest_scale(holds, start=start, tolerance=_TOLERANCE, evaluations=_EVALUATIONS)


def _point(scene: Scene, run: Run, scale: float) -> CurvePoint:
    summary = run.results.summary(scene.slo)
    return CurvePoint(
        rate_scale=scale,
        slo_attainment=summary.slo_attainment,
        p50_e2e_s=summary.e2e_s.p50,
        p99_e2e_s=summary.e2e_s.p99,
        goodput_rps=summary.goodput_rps,
    )


def _row(
    scene: Scene,
    policy: Policy,
    name: str,
    run: Run,
    most: float | None,
    points: Sequence[CurvePoint],
) -> Row:
    results = run.results
    summary = results.summary(scene.slo)
    serving = policy.initial(1.0)
    return Row(
        policy=name,
        deployment=deployment_of(serving.plan),
        levers=_levers(policy),
        p50_e2e_s=summary.e2e_s.p50,
        p99_e2e_s=summary.e2e_s.p99,
        p50_ttft_s=summary.ttft_s.p50,
        p99_ttft_s=summary.ttft_s.p99,
        p50_tpot_s=summary.tpot_s.p50,
        p99_tpot_s=summary.tpot_s.p99,
        throughput_rps=summary.requests_per_s,
        goodput_rps=summary.goodput_rps,
        slo_attainment=summary.slo_attainment,
        max_rate_scale=most,
        device_hours=run.device_s / 3600.0,
        energy_joules=run.energy_j,
        switches=run.switches,
        lost=int(np.sum(results.status != Status.COMPLETED)),
        replayed=int(results.replays.sum()),
        changes=tuple((change.at_s, change.deployment) for change in run.changes),
        quantiles=_quantiles(results),
        queue=_queue(results),
        tiers=tier_rows(results, scene.tiers),
        tenants=tenant_rows(results, scene.tenants),
        points=tuple(sorted(points, key=lambda item: item.rate_scale)),
    )


def _levers(policy: Policy) -> dict[str, Any]:
    """The levers as JSON-ready data."""
    levers = policy.initial(1.0).levers
    shape = policy.initial(1.0).plan.replicas[0].shape
    order = levers.order
    return {
        "routing": levers.routing.name.lower(),
        "overflow_s": levers.gateway.overflow_s,
        "order_s_per_1500_tokens": None if order is None else order.penalty_s_per_token * 1500,
        "freshest_first_s": 0.0 if order is None else order.freshest_first_s,
        "inflight_per_device": levers.inflight_per_device,
        "demote_after_s": levers.overload.late_after_s or levers.gateway.demote_after_s,
        "by_prompts_owed": levers.overload.ttft_s is not None,
        "max_num_seqs": shape.max_num_seqs,
    }


def _quantiles(results: FleetResults) -> dict[str, tuple[float, ...]]:
    done = results.status == Status.COMPLETED
    first = (results.first_token_s - results.arrival_s)[done]
    whole = (results.finish_s - results.arrival_s)[done]
    gaps = results.made_tokens[done] - 1
    tpot = (whole - first)[gaps > 0] / gaps[gaps > 0]
    return {
        name: tuple(float(v) for v in np.quantile(values, QUANTILES)) if len(values) else ()
        for name, values in (("ttft_s", first), ("tpot_s", tpot), ("e2e_s", whole))
    }


def _queue(results: FleetResults) -> tuple[tuple[float, int], ...]:
    arrival = np.sort(results.arrival_s)
    if not len(arrival):
        return ()
    left = np.where(np.isfinite(results.first_token_s), results.first_token_s, results.finish_s)
    first = np.sort(left[np.isfinite(left)])
    moments = np.linspace(0.0, float(arrival[-1]), _MOMENTS)
    waiting = np.searchsorted(arrival, moments, "right") - np.searchsorted(first, moments, "right")
    return tuple((float(at), int(count)) for at, count in zip(moments, waiting, strict=True))


# -- over processes -----------------------------------------------------------------------------
ProgressCallback = Callable[[int, str], None]
"""Called with the index of the scene and the name of the policy that is done."""

_scenes: tuple[Scene, ...] = ()
_tuners: dict[int, OServeTuner] = {}


def compare(
    scenes: Sequence[Scene],
    names: Sequence[str],
    wish: CompareOptions | Sequence[CompareOptions],
    *,
    jobs: int = 1,
    progress: ProgressCallback = lambda _scene, _name: None,
) -> list[list[Row]]:
    """Rows by scene, in the order of ``names``. ``wish``: one for all scenes, or one each."""
    wishes = [wish] * len(scenes) if isinstance(wish, CompareOptions) else list(wish)
    tasks = [(at, name) for at in range(len(scenes)) for name in names]
    if jobs <= 1 or len(tasks) == 1:
        tuners = [OServeTuner(scene) for scene in scenes]
        found = {}
        for at, name in tasks:
            found[at, name] = evaluate(tuners[at], name, wishes[at])
            progress(at, name)
    else:
        found = _in_processes(scenes, tasks, wishes, jobs, progress)
    return [[found[at, name] for name in names] for at in range(len(scenes))]


def _in_processes(
    scenes: Sequence[Scene],
    tasks: Sequence[tuple[int, str]],
    wishes: Sequence[CompareOptions],
    jobs: int,
    progress: ProgressCallback,
) -> dict[tuple[int, str], Row]:
    found: dict[tuple[int, str], Row] = {}
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        max_workers=min(jobs, len(tasks)),
        mp_context=context,
        initializer=_prepare,
        initargs=(tuple(scenes),),
    )
    # While there are enough scenes, one process has all tasks of a scene and searches once.
    groups = _groups(tasks, len(scenes), jobs)
    with pool:
        running: dict[Future[list[Row]], list[tuple[int, str]]] = {
            pool.submit(_work, [(at, name, wishes[at]) for at, name in group]): group
            for group in groups
        }
        try:
            while running:
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    group = running.pop(future)
                    for (at, name), row in zip(group, future.result(), strict=True):
                        found[at, name] = row
                        progress(at, name)
        except BaseException:  # an interrupt ends the workers as well
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return found


def _groups(
    tasks: Sequence[tuple[int, str]], scenes: int, jobs: int
) -> list[list[tuple[int, str]]]:
    if scenes >= jobs:
        return [[task for task in tasks if task[0] == at] for at in range(scenes)]
    return [[task] for task in tasks]


def _prepare(scenes: tuple[Scene, ...]) -> None:
    global _scenes  # noqa: PLW0603 - what a process of the pool works on
    _scenes = scenes
    _tuners.clear()


def _work(tasks: Sequence[tuple[int, str, CompareOptions]]) -> list[Row]:
    rows = []
    for at, name, wish in tasks:
        tuner = _tuners.setdefault(at, OServeTuner(_scenes[at]))
        rows.append(evaluate(tuner, name, wish))
    return rows


def usable_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
