"""All policies on four models and two cluster sizes, beside the paper's gains.

Capacity, and latency at fixed fractions of the capacity of static-best.

python experiments/main_table/run.py --trace azure2023-mix-dev.csv.gz
"""

from oserve.study.compare import Row
from oserve.study.experiment import LOADS, capacity, measured, ratio, scene, setup, tell, words
from oserve.study.policies import POLICIES

MODELS = ("opt-30b", "opt-66b", "llama-30b", "llama-2-70b")
CLUSTERS = ("2x8xH100", "4x8xH100")
# Other objectives and ways to switch: see experiments/day and experiments/control.
LEFT_OUT = ("oserve-energy", "oserve-capacity", "oserve-reload", "oserve-last-value")
# Of OServe over each, in P99 latency or throughput; 12-20 % is given for Dynamo.
PAPER = {
    "static-default": "1.5x (up to 2.0x)",
    "static-best": "1.5x (up to 2.0x)",
    "reload": "1.3x (up to 1.5x)",
    "llumnix": "1.32x-1.51x",
    "dynamo": "1.12x-1.20x",
}


def main() -> None:
    asked = setup(__doc__ or "", duration_s=600.0, models=MODELS)
    requests = asked.requests()
    scenes = [
        scene(asked, model, cluster, requests) for cluster in CLUSTERS for model in asked.models
    ]
    names = [name for name in POLICIES if name not in LEFT_OUT]
    found = measured(asked, scenes, names, loads=LOADS)
    print(f"SimulatedTraffic: {asked.words}. Capacity: largest rate scale within the SLO.")
    heads = ["policy", *(item.name for item in scenes)]
    tell(
        "Capacity",
        heads,
        [[name, *(f"{capacity(rows[name]):.2f}" for rows in found)] for name in names],
    )
    tell(
        "OServe over each: capacity / P99 E2E at the knee of static-best",
        [*heads, "paper"],
        [
            [
                name,
                *(ratio(rows["oserve-static"], rows[name]) for rows in found),
                PAPER.get(name, ""),
            ]
            for name in names
            if name != "oserve-static"
        ],
    )
    for item, rows in zip(scenes, found, strict=True):
        tell(
            f"{item.name}: E2E P50 / P99 s, attainment at fractions of static-best's capacity",
            ["policy", *(f"{load:g}" for load in LOADS)],
            [[name, *at_loads(rows[name])] for name in names],
        )
    tell(
        "Deployments",
        heads,
        [
            [name, *(words(rows[name]) for rows in found)]
            for name in ("static-default", "static-best", "static-best-tuned", "oserve-static")
        ],
    )


def at_loads(row: Row) -> list[str]:
    """The points below the knee, which come first."""
    return [
        f"{point.p50_e2e_s:.2f} / {point.p99_e2e_s:.2f}, {point.slo_attainment:.1%}"
        for point in row.points[: len(LOADS)]
    ]


if __name__ == "__main__":
    main()
