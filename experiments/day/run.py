"""A day's traffic by hour: every policy's latencies, joules, devices, switches and KV cache.

The fleet is sized for its peak: the load is scaled so that the busiest hour takes --peak of the
capacity of static-best-tuned in that hour. Static baselines are tuned on the reported day, in
hindsight; all others on another day (or, of a trace, on its first half).

    python experiments/day/run.py                     # a synthetic day
    python experiments/day/run.py --compress 6 --start-hour 0 \\
        --part azure2024-conv-rate.csv.gz=azure2023-conv.csv.gz@48 \\
        --part azure2024-code-rate.csv.gz=azure2023-code.csv.gz@0
    python experiments/day/run.py --trace servegen-r1.csv.gz --compress 6
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from oserve.config import load_cluster
from oserve.core import OServeError
from oserve.study.day_plot import draw
from oserve.study.days import DayTraffic, DrawnDay, TraceDay, day_scene, hour_in_s, sized_load
from oserve.study.experiment import SLO, tell
from oserve.study.hours import (
    DayFigures,
    HourFigures,
    Latencies,
    best_by_hour,
    day_document,
    day_figures,
    hour_marks,
    ratios,
)
from oserve.study.ours import OServeTuner
from oserve.study.policies import POLICIES, policy_names
from oserve.study.runner import run_policy
from oserve.study.scene import CHUNKS, Scene, SceneChoice
from oserve.traces import read_trace
from oserve.traces.counts import read_counts
from oserve.traces.days import DayPart, dispersion_of, synthetic_parts, window_rates

NAMES = (
    "static-default",
    "static-best",
    "static-best-chunk",
    "static-best-tuned",
    "static-latency",
    "reload",
    "llumnix",
    "dynamo",
    "aibrix",
    "llmd",
    "oserve",
    "oserve-energy",
    "oserve-capacity",
    "oracle",
)
MODELS = ("llama-2-70b", "opt-66b")


@dataclass(frozen=True, kw_only=True)
class Work:
    """All that a process needs to run a policy."""

    scene: Scene
    hindsight: Scene
    hours: int
    hour_s: int


def main() -> None:
    asked = arguments()
    names = policy_names(asked.policies)
    day = day_of(asked)
    documents, drawn = [], []
    for model in asked.models.split(","):
        for cluster in asked.clusters.split(","):
            work, load = prepared(asked, day, model, cluster)
            days = run_all(work, names, asked.jobs)
            bound = bound_of(work) if asked.bound else None
            words = (
                f"{work.scene.name}: {day.words}; {len(work.scene.traffic):,} requests, load "
                f"{load:.3f}; the busiest hour at {asked.peak:g} of static-best-tuned's capacity"
            )
            show(words, days, bound, asked.base)
            documents.append(
                {
                    "scene": work.scene.name,
                    "words": words,
                    "hour_s": work.hour_s,
                    "compress": asked.compress,
                    "policies": [day_document(item) for item in days],
                    "bound": None
                    if bound is None
                    else [(n, x.e2e.p50_s, x.e2e.p99_s) for n, x in bound],
                }
            )
            drawn.append((words, days))
    if asked.out is not None:
        asked.out.write_text(json.dumps(documents, indent=2), encoding="utf-8")
    if asked.plot is not None:
        for at, (words, days) in enumerate(drawn):
            path = asked.plot
            if len(drawn) > 1:
                path = path.with_stem(f"{path.stem}-{at + 1}")
            draw(days, path, title=words)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--part",
        action="append",
        metavar="RATES=REQUESTS[@HOUR[,LEARNED]]",
        help="rates per window, and a trace of requests for its lengths and bursts; the day begins "
        "at that hour of the rates, the learned day at another (default: the same)",
    )
    source.add_argument("--trace", help="request trace; its first half is learned")
    parser.add_argument(
        "--learned-hours", type=int, help="of a trace, not reported; default: its first half"
    )
    parser.add_argument("--hours", type=float, default=24.0, help="of a drawn day")
    parser.add_argument("--compress", type=float, default=1.0, help="an hour takes 1 / so much")
    parser.add_argument("--peak", type=float, default=0.9, help="load of the busiest hour")
    parser.add_argument("--learn", choices=("first", "hindsight"), default="first")
    parser.add_argument(
        "--bursts", type=float, help="variance over mean per 10 s; as in the requests without it"
    )
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--clusters", default="2x8xH100")
    parser.add_argument("--policies", default=",".join(NAMES))
    parser.add_argument("--base", default="oserve", help="the policy that ratios are over")
    parser.add_argument("--bound", action="store_true", help="also the best static one by hour")
    parser.add_argument("--interval", type=float, default=60.0, help="seconds between decisions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, help="also write all figures as JSON")
    parser.add_argument("--plot", type=Path, help="also draw the day (PNG, SVG or PDF)")
    return parser.parse_args()


# -- the day ------------------------------------------------------------------------------------
def day_of(asked: argparse.Namespace) -> DayTraffic:
    hour_in_s(asked.compress)
    if asked.trace is not None:
        return TraceDay(
            requests=list(read_trace(asked.trace)),
            compress=asked.compress,
            seed=asked.seed,
            source=Path(asked.trace).name,
            learned_h=asked.learned_hours,
        )
    if asked.part is None:
        parts = learned = synthetic_parts(seed=asked.seed, hours=asked.hours)
        source = f"a synthetic day (seed {asked.seed})"
    else:
        found = [part_of(text, asked) for text in asked.part]
        parts, learned = [one for one, _ in found], [other for _, other in found]
        source = " + ".join(part.name for part in parts)
    return DrawnDay(
        parts=parts,
        learned_parts=learned,
        compress=asked.compress,
        seed=asked.seed,
        source=source,
    )


def part_of(text: str, asked: argparse.Namespace) -> tuple[DayPart, DayPart]:
    """The reported and the learned part that an argument names."""
    curve, _, rest = text.partition("=")
    trace, _, hours = rest.partition("@")
    try:
        starts = [float(item) for item in (hours or "0").split(",")]
    except ValueError:
        starts = []
    if not trace or len(starts) not in {1, 2}:
        raise OServeError(
            f"it is {text!r}",
            place="--part",
            remedy="use RATES=REQUESTS, RATES=REQUESTS@HOUR or RATES=REQUESTS@HOUR,LEARNED",
        )
    table = read_counts(Path(curve))
    rates = table.counts.sum(axis=1) / table.window_s
    requests = list(read_trace(trace))
    arrival = np.array([request.arrival_s for request in requests])
    bursts = dispersion_of(arrival - arrival[0]) if asked.bursts is None else asked.bursts
    made = [
        DayPart(
            name=Path(curve).name.split(".")[0],
            rates_rps=window_rates(
                rates, window_s=table.window_s, start_h=start_h, hours=asked.hours
            ),
            prompt_tokens=np.array([request.prompt_tokens for request in requests]),
            output_tokens=np.array([request.output_tokens for request in requests]),
            window_s=table.window_s,
            dispersion=bursts,
        )
        for start_h in (starts[0], starts[-1])
    ]
    return made[0], made[1]


def prepared(
    asked: argparse.Namespace, day: DayTraffic, model: str, cluster: str
) -> tuple[Work, float]:
    spec = load_cluster(cluster)
    choice = SceneChoice(
        model=model,
        devices=spec.devices,
        network=spec.network,
        slo=SLO,
        seed=asked.seed,
        interval_s=asked.interval,
    )
    load = sized_load(choice, day, peak_share=asked.peak, said=clock(f"{model} on {cluster}"))
    reported, learned = day.reported(load), day.learned(load)
    scenes = [
        day_scene(
            choice,
            reported=reported,
            learned=known,
            hour_s=day.hour_s,
            name=f"{model} on {cluster}",
            source_name=day.words,
        )
        for known in (learned, reported)
    ]
    tuned = scenes[1] if asked.learn == "hindsight" else scenes[0]
    return Work(scene=tuned, hindsight=scenes[1], hours=day.hours, hour_s=day.hour_s), load


# -- policies -----------------------------------------------------------------------------------
_tuners: dict[bool, OServeTuner] = {}
_work: list[Work] = []


def run_all(work: Work, names: Sequence[str], jobs: int) -> list[DayFigures]:
    prepare(work)
    if jobs <= 1:
        return [run_one(name) for name in names]
    pool = ProcessPoolExecutor(
        max_workers=min(jobs, len(names)),
        mp_context=get_context("spawn"),
        initializer=prepare,
        initargs=(work,),
    )
    with pool:
        return list(pool.map(run_one, names))


def prepare(work: Work) -> None:
    _tuners.clear()
    _work[:] = [work]


def run_one(name: str) -> DayFigures:
    (work,) = _work
    static = name.startswith("static-")
    scene = work.hindsight if static else work.scene
    tell_time = clock(f"{scene.name}: {name}")
    tuner = _tuners.setdefault(static, OServeTuner(scene))
    policy = POLICIES[name].make(tuner)
    tell_time("tuned")

    def told(now_s: float) -> None:
        if not static:
            tell_time(f"hour {now_s / work.hour_s:.0f}")

    run = run_policy(
        scene,
        policy,
        tuner.simulator,
        1.0,
        marks_s=hour_marks(work.hours, work.hour_s),
        said=told,
    )
    found = day_figures(name, run, scene.slo, hours=work.hours, hour_s=work.hour_s)
    whole = found.whole.latencies
    tell_time(f"P99 E2E {whole.e2e.p99_s:.2f} s, {whole.slo_attainment:.2%} within the SLO")
    return found


def bound_of(work: Work) -> list[tuple[str, Latencies]]:
    scene = work.hindsight
    tell_time = clock(f"{scene.name}: best static deployment by hour")
    tuner = _tuners.setdefault(True, OServeTuner(scene))
    levers = tuner.best_tuned.serving.levers
    servings = [tuner.homogeneous(shape, levers) for shape in tuner.forms(CHUNKS)]
    servings.append(tuner.latency)
    found = best_by_hour(
        tuner.simulator, servings, scene.traffic, scene.slo, hours=work.hours, hour_s=work.hour_s
    )
    tell_time(f"of {len(servings)}")
    return found


def clock(what: str) -> Callable[[str], None]:
    began_s = time.perf_counter()

    def said(words: str) -> None:
        print(
            f"{what}: {words} ({time.perf_counter() - began_s:.1f} s)", file=sys.stderr, flush=True
        )

    return said


# -- tables -------------------------------------------------------------------------------------
def show(
    words: str, days: Sequence[DayFigures], bound: Sequence[tuple[str, Latencies]] | None, base: str
) -> None:
    print(f"\n{words}.")
    tell("The day", WHOLE, [whole_line(day) for day in days])
    own = next((day for day in days if day.policy == base), None)
    if own is not None:
        tell(
            f"E2E of each policy over {base}'s by hour: geometric mean (largest, smallest)",
            ["policy", "P99", "P50"],
            [
                [day.policy, *(ratio_words(day, own, pick) for pick in (p99, p50))]
                for day in days
                if day is not own
            ],
        )
    tell_hours("P99 E2E by hour, seconds (! below 95 % within the SLO)", days, p99, bound)
    tell_hours("P50 E2E by hour, seconds", days, p50, bound)
    tell_hours("MJ by hour, idle devices included", days, lambda row: row.total_j / 1e6)
    tell_hours("KV cache by hour, mean share in use", days, lambda row: row.kv_mean)
    tell_hours("Largest mean use of a replica over the mean", days, lambda row: row.kv_imbalance)
    moved = [day for day in days if day.whole.switches]
    if moved:
        tell(
            "Deployments by hour, at its end",
            ["hour", *(day.policy for day in moved)],
            [
                [str(rows[0].hour), *(row.deployment for row in rows)]
                for rows in zip(*(day.hours for day in moved), strict=False)
            ],
        )
    if bound is not None:
        tell_bound(days, bound)


WHOLE = (
    "policy",
    "P50 / P99 TTFT s",
    "P50 / P99 TPOT ms",
    "P50 / P99 E2E s",
    "in SLO",
    "worst hour",
    "hours below 95 %",
    "MJ held",
    "MJ with idle",
    "device h",
    "switches",
    "KV mean / peak / imbalance",
    "lost",
)


def whole_line(day: DayFigures) -> list[str]:
    row, found = day.whole, day.whole.latencies
    worst = min((item.latencies.slo_attainment for item in day.hours), default=1.0)
    return [
        day.policy,
        f"{found.ttft.p50_s:.2f} / {found.ttft.p99_s:.2f}",
        f"{found.tpot.p50_s * 1e3:.0f} / {found.tpot.p99_s * 1e3:.0f}",
        f"{found.e2e.p50_s:.2f} / {found.e2e.p99_s:.2f}",
        f"{found.slo_attainment:.2%}",
        f"{worst:.1%}",
        ", ".join(map(str, day.missed)) or "none",
        f"{row.energy_j / 1e6:.1f}",
        f"{row.total_j / 1e6:.1f}",
        f"{row.device_s / 3600:.1f}",
        str(row.switches),
        f"{row.kv_mean:.0%} / {row.kv_peak:.0%} / {row.kv_imbalance:.2f}",
        str(found.lost),
    ]


def p99(row: HourFigures) -> float:
    return row.latencies.e2e.p99_s


def p50(row: HourFigures) -> float:
    return row.latencies.e2e.p50_s


def ratio_words(day: DayFigures, base: DayFigures, pick: Callable[[HourFigures], float]) -> str:
    found = ratios([pick(row) for row in day.hours], [pick(row) for row in base.hours])
    return f"{found.mean:.2f} ({found.largest:.2f}, {found.smallest:.2f})"


def tell_hours(
    title: str,
    days: Sequence[DayFigures],
    pick: Callable[[HourFigures], float],
    bound: Sequence[tuple[str, Latencies]] | None = None,
) -> None:
    marked = pick is p99
    lines = []
    for rows in zip(*(day.hours for day in days), strict=False):
        hour = rows[0].hour
        line = [str(hour), str(rows[0].latencies.requests)]
        line += [f"{pick(row):.2f}{'!' if marked and not row.holds else ''}" for row in rows]
        if bound is not None:
            name, found = bound[hour]
            line += [f"{found.e2e.p99_s if marked else found.e2e.p50_s:.2f}", name]
        lines.append(line)
    heads = ["hour", "requests", *(day.policy for day in days)]
    tell(title, heads + ([] if bound is None else ["best by hour", "which"]), lines)


def tell_bound(days: Sequence[DayFigures], bound: Sequence[tuple[str, Latencies]]) -> None:
    def over(day: DayFigures, pick: Callable[[Latencies], float]) -> str:
        found = ratios(
            [pick(row.latencies) for row in day.hours], [pick(item) for _, item in bound]
        )
        return f"{found.mean:.2f} ({found.largest:.2f}, {found.smallest:.2f})"

    tell(
        "E2E of each policy over the best static deployment of the hour, in hindsight",
        ["policy", "P99", "P50"],
        [
            [day.policy, over(day, lambda x: x.e2e.p99_s), over(day, lambda x: x.e2e.p50_s)]
            for day in days
        ],
    )


if __name__ == "__main__":
    main()
