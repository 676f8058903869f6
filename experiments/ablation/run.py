"""OServe's parts switched on one after the other, over vLLM with reload and over static ones.

The paper, P99 over reload: heterogeneous deployment +34 %, assignment +64 %, switching a further
12 %.

    python experiments/ablation/run.py --trace azure2023-mix-dev.csv.gz
"""

from oserve.study.experiment import capacity, measured, ratio, scene, setup, tell, words

STEPS = {
    "reload": "1",
    "static-best": "",
    "static-best-chunk": "",
    "static-best-tuned": "",
    "oserve-shapes": "1.34x",
    "oserve-assign": "1.64x",
    "oserve-static": "",
    "oserve": "a further 1.12x",
}


def main() -> None:
    asked = setup(__doc__ or "", duration_s=900.0, models=("opt-66b", "llama-2-70b"))
    requests = asked.requests()
    scenes = [scene(asked, model, "2x8xH100", requests) for model in asked.models]
    found = measured(asked, scenes, list(STEPS))
    print(f"SimulatedTraffic: {asked.words}.")
    for item, rows in zip(scenes, found, strict=True):
        tell(
            f"{item.name}: over reload and over static-best (capacity / P99 E2E at the knee)",
            (
                "policy",
                "capacity",
                "P99 TTFT, s",
                "P99 E2E, s",
                "over reload",
                "over static-best",
                "deployment",
                "paper, P99 over reload",
            ),
            [
                [
                    name,
                    f"{capacity(rows[name]):.2f}",
                    f"{rows[name].p99_ttft_s:.1f}",
                    f"{rows[name].p99_e2e_s:.1f}",
                    ratio(rows[name], rows["reload"]),
                    ratio(rows[name], rows["static-best"]),
                    words(rows[name]),
                    paper,
                ]
                for name, paper in STEPS.items()
            ],
        )


if __name__ == "__main__":
    main()
