"""Every lever alone, on the best homogeneous deployment, and all together; roles apart.

With --hold-out settings are searched on the first part of the traffic and reported on the rest.

python experiments/levers/run.py --trace azure2023-mix-dev.csv.gz --hold-out 0.5
"""

import math
from argparse import ArgumentParser
from collections.abc import Mapping

from oserve.evaluate.tuning import Verdict
from oserve.evaluate.tuning_run import TuningRun
from oserve.study.experiment import KNEE, scene, setup, tell
from oserve.study.levers import capacities, lever_servings, tuned_constants
from oserve.study.ours import OServeTuner
from oserve.study.roles import apart

_BASES = ("static-default", "static-best", "+ chunk budget and order (static-best-tuned)")


def _held_out(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--hold-out", type=float, default=0.0, help="share of the time to report on; 0: none"
    )
    parser.add_argument("--no-roles", action="store_true", help="leave out separate roles")


def main() -> None:
    asked = setup(
        __doc__ or "", duration_s=900.0, models=("opt-66b", "llama-2-70b"), more=_held_out
    )
    hold_out = float(asked.more["hold_out"])
    requests = asked.requests()
    end_s = requests[-1].arrival_s
    learn_s = end_s * (1.0 - hold_out) if hold_out else None
    part = f"; settings of its first {learn_s:.0f} s, reported on the rest" if learn_s else ""
    print(f"Traffic: {asked.words}{part}. 16 H100, capacity and gain over static-best.")
    tuners = {
        model: OServeTuner(scene(asked, model, "2x8xH100", requests, learn_s=learn_s))
        for model in asked.models
    }
    found = {}
    for model, tuner in tuners.items():
        rest = tuner.scene.traffic.between(learn_s, math.inf) if learn_s else None
        found[model] = capacities(tuner, lever_servings(tuner), rest)
    _tell_levers(found)
    for model, tuner in tuners.items():
        if hold_out:
            _tell_constants(model, tuned_constants(tuner, hold_out=hold_out))
        if not asked.more["no_roles"]:
            _tell_roles(model, tuner)


def _tell_levers(found: Mapping[str, Mapping[str, float]]) -> None:
    names = list(dict.fromkeys(name for scales in found.values() for name in scales))
    base = {model: scales["static-best"] for model, scales in found.items()}
    tell(
        "Levers",
        ("lever", *found),
        [
            [
                name,
                *(
                    f"{found[m][name]:.2f} ({found[m][name] / base[m]:.2f}x)"
                    if name in found[m]
                    else "-"
                    for m in found
                ),
            ]
            for name in names
        ],
    )
    tell(
        "All together over",
        ("", *found),
        [
            [name, *(f"{found[m]['+ all together'] / found[m][name]:.2f}x" for m in found)]
            for name in _BASES
        ],
    )


def _tell_constants(model: str, run: TuningRun) -> None:
    tuned = run.tuned
    lines = [
        [
            item.name.value,
            str(item.present),
            str(item.proposed),
            "" if item.gain is None else f"{item.gain.mean:+.1%}",
            "" if item.held_out_gain is None else f"{item.held_out_gain.mean:+.1%}",
            item.verdict.value,
        ]
        for item in tuned.reports
        if item.verdict is not Verdict.SAME
    ]
    whole = [f"{gain.mean:+.1%} (+-{gain.error:.1%})" for gain in (tuned.gain, tuned.held_out_gain)]
    lines.append(["all", "", "", *whole, "promoted" if tuned.promoted else "nothing"])
    tell(
        f"{model}: a server's constants, present defaults, {run.runs} simulations; capacity held "
        f"out {run.before.capacity:.2f} to {run.after.capacity:.2f}",
        ("constant", "present", "proposed", "gain", "held out", "verdict"),
        lines,
    )


def _tell_roles(model: str, tuner: OServeTuner) -> None:
    rows = apart(tuner, scale=KNEE * tuner.best.scale)
    tell(
        f"{model}: prefill and decode on replicas of their own; P99 at {KNEE:g} times "
        "the capacity of static-best",
        ("", "deployment", "capacity", "TTFT, s", "TPOT, ms", "E2E, s"),
        [
            [
                name,
                row.deployment,
                f"{row.capacity_scale:.2f}",
                f"{row.p99_ttft_s:.2f}",
                f"{row.p99_tpot_s * 1e3:.0f}",
                f"{row.p99_e2e_s:.1f}",
            ]
            for name, row in rows.items()
        ],
    )


if __name__ == "__main__":
    main()
