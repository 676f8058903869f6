"""The live controller in the simulator: what it gains, and what each of its switches was worth.

Without --trace: a step, a ramp, a flash crowd, a square wave and a sine of the mix, from long
answers to long documents, short chats throughout. Loads are multiples of what static-best-tuned
carries. Each switch is judged by the same traffic without it, in requests within the SLO.

    python experiments/control/run.py [--patterns step,sine] [--loads 1.0,1.2] [--drawings 2]
    python experiments/control/run.py --trace azure2023-mix-dev.csv.gz --duration 1800

With --ways: what it is worth that weights move. The switches of an oracle, at its moments, made by
restarts, by transfer, and in no time. The paper, P99: ad hoc switching gives 12 % over reloading on
average, 17 % at most.

    python experiments/control/run.py --ways --loads 1.2 --duration 1500
"""

import argparse
import json
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from oserve.config import load_switch_costs
from oserve.evaluate.simulator import SimulatedTraffic, traffic_from
from oserve.study.control import LoadCourse, courses
from oserve.study.counterfactual import jittered
from oserve.study.experiment import SLO, Setup, scene, tell
from oserve.study.ours import OServeTuner
from oserve.study.ways import ways
from oserve.switch.costs import SwitchCosts
from oserve.traces import PATTERNS, TraceRequest, synthesise_pattern

# Near the knee of the tuned static deployment of 16 H100 at either end.
ANSWERS = {"chat": 10.0, "documents": 2.0, "answers": 24.0}
DOCUMENTS = {"chat": 10.0, "documents": 14.0, "answers": 1.0}
CHUNKS, SEQS = (512, 1024, 2048), (256,)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trace", help="request trace; synthetic patterns without one")
    parser.add_argument("--patterns", default=",".join(PATTERNS))
    parser.add_argument("--models", default="llama-2-70b")
    parser.add_argument("--cluster", default="2x8xH100")
    parser.add_argument("--duration", type=float, default=900.0, help="seconds of traffic")
    parser.add_argument(
        "--tune-seconds",
        type=float,
        help="search settings on a drawing of the pattern of this length, not in hindsight",
    )
    parser.add_argument("--loads", default="1.0,1.2", help="of static-best-tuned's capacity")
    parser.add_argument("--drawings", type=int, default=2, help="that switches are judged by, too")
    parser.add_argument("--ways", action="store_true", help="switches made in different ways")
    parser.add_argument("--policies", default="", help="only these, by name, with ; between")
    parser.add_argument("--switch-costs", help="file that benchmarks/switch/fit.py wrote")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="also write all figures as JSON")
    given = parser.parse_args()
    asked = Setup(
        trace=given.trace,
        duration_s=given.duration,
        seed=given.seed,
        jobs=1,
        models=tuple(given.models.split(",")),
        out=given.out,
        switch_costs=load_switch_costs(given.switch_costs) if given.switch_costs else SwitchCosts(),
    )
    titles = [Path(given.trace).name] if given.trace else given.patterns.split(",")
    found: dict[str, list[LoadCourse]] = {}
    for model in asked.models:
        for title in titles:
            found[f"{model}, {title}"] = measured(asked, model, title, given)
            told(f"{model}, {title}", found[f"{model}, {title}"])
    if given.out is not None:
        document = {name: [asdict(item) for item in rows] for name, rows in found.items()}
        given.out.write_text(json.dumps(document, indent=2, default=str), encoding="utf-8")


def requests(asked: Setup, title: str, seed: int, duration_s: float) -> list[TraceRequest]:
    if asked.trace is not None:
        return asked.requests()
    return list(
        synthesise_pattern(PATTERNS[title], ANSWERS, DOCUMENTS, duration_s=duration_s, seed=seed)
    )


def measured(asked: Setup, model: str, title: str, given: argparse.Namespace) -> list[LoadCourse]:
    made = scene(
        asked,
        model,
        given.cluster,
        requests(asked, title, asked.seed, given.tune_seconds or asked.duration_s),
        name=title,
        chunks=CHUNKS,
        seqs=SEQS,
    )

    def drawing(seed: int) -> SimulatedTraffic:
        if asked.trace is not None:
            return jittered(made.traffic, seed=seed)
        return traffic_from(
            requests(asked, title, seed, asked.duration_s), max_model_len=made.context
        )

    played = drawing(asked.seed) if given.tune_seconds and not asked.trace else None
    count = len(made.traffic if played is None else played)
    print(f"{model}, {title}: {count:,} requests", file=sys.stderr, flush=True)
    seeds = range(asked.seed + 1, asked.seed + 1 + given.drawings)
    loads = [float(load) for load in given.loads.split(",")]
    if given.ways:
        return ways(OServeTuner(made), loads)
    return courses(
        OServeTuner(made),
        loads,
        drawings=[drawing(seed) for seed in seeds],
        names=[name for name in given.policies.split(";") if name],
        played=played,
    )


def told(title: str, rows: list[LoadCourse]) -> None:
    tell(
        f"{title}: SLO {SLO.ttft_s:g} s TTFT, {SLO.tpot_s:g} s TPOT",
        (
            "load",
            "policy",
            "SLO attainment",
            "goodput, 1/s",
            "P99 TTFT, s",
            "P99 E2E, s",
            "switches",
            "worth of each, requests (expected)",
        ),
        [
            [
                f"{row.factor:g}",
                row.policy,
                f"{row.slo_attainment:.3f}",
                f"{row.goodput_rps:.2f}",
                f"{row.p99_ttft_s:.1f}",
                f"{row.p99_e2e_s:.1f}",
                f"{row.switches} ({row.switches_per_hour:.0f}/h)",
                "; ".join(
                    f"at {item.at_s:.0f} s {item.mean:+.0f} +- {item.error:.0f}"
                    f" ({item.expected:+.0f}){' HARMFUL' if item.harmful else ''}"
                    for item in row.worths
                ),
            ]
            for row in rows
        ],
    )
    for row in rows:
        if row.decisions:
            reasons = Counter(str(item.reason) for item in row.decisions)
            print(
                f"{row.factor:g}, {row.policy}: "
                + ", ".join(f"{c} {n}" for n, c in reasons.items())
            )
    sys.stdout.flush()


if __name__ == "__main__":
    main()
