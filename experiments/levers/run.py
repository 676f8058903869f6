"""Every lever alone, on the best homogeneous deployment, and all together; roles apart.

python experiments/levers/run.py --trace azure2023-mix-dev.csv.gz
"""

from oserve.study.experiment import KNEE, scene, setup, tell
from oserve.study.levers import lever_capacities
from oserve.study.ours import OServeTuner
from oserve.study.roles import apart


def main() -> None:
    asked = setup(__doc__ or "", duration_s=900.0, models=("opt-66b", "llama-2-70b"))
    requests = asked.requests()
    print(f"SimulatedTraffic: {asked.words}. 16 H100, capacity and gain over static-best.")
    tuners = {
        model: OServeTuner(scene(asked, model, "2x8xH100", requests)) for model in asked.models
    }
    found = {model: lever_capacities(tuner) for model, tuner in tuners.items()}
    names = list(dict.fromkeys(name for scales in found.values() for name in scales))
    base = {model: scales["static-best"] for model, scales in found.items()}
    tell(
        "Levers",
        ("lever", *asked.models),
        [
            [
                name,
                *(
                    f"{found[m][name]:.2f} ({found[m][name] / base[m]:.2f}x)"
                    if name in found[m]
                    else "-"
                    for m in asked.models
                ),
            ]
            for name in names
        ],
    )
    for model, tuner in tuners.items():
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
