"""Weights in 16 and 8 bits, and both side by side; baselines get the same.

python experiments/precision/run.py --trace azure2023-mix-dev.csv.gz
"""

from oserve.core import Precision
from oserve.study.experiment import capacity, measured, ratio, scene, setup, tell, words

POLICIES = ("static-default", "static-best", "static-best-tuned", "oserve-static")
CHOICES = {
    "bf16": (Precision.BF16,),
    "fp8": (Precision.FP8,),
    "mixed": (Precision.FP8, Precision.BF16),
}


def main() -> None:
    asked = setup(__doc__ or "", duration_s=600.0, models=("opt-66b", "llama-2-70b"))
    requests = asked.requests()
    print(f"SimulatedTraffic: {asked.words}. Baselines of 'mixed' are in fp8.")
    for model in asked.models:
        scenes = [
            scene(asked, model, "2x8xH100", requests, name=name, precisions=precisions)
            for name, precisions in CHOICES.items()
        ]
        found = measured(asked, scenes, POLICIES)
        tell(
            f"{model}, 16 H100: capacity",
            ("policy", *CHOICES, "fp8 over bf16"),
            [
                [
                    name,
                    *(f"{capacity(rows[name]):.2f}" for rows in found),
                    f"{capacity(found[1][name]) / capacity(found[0][name]):.2f}x",
                ]
                for name in POLICIES
            ],
        )
        tell(
            "oserve-static over each: capacity / P99 E2E at the knee of static-best",
            ("policy", *CHOICES),
            [
                *(
                    [name, *(ratio(rows["oserve-static"], rows[name]) for rows in found)]
                    for name in POLICIES[:-1]
                ),
                ["deployment", *(words(rows["oserve-static"]) for rows in found)],
            ],
        )


if __name__ == "__main__":
    main()
