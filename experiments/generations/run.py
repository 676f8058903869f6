"""Clusters of one and of two kinds of device.

python experiments/generations/run.py --trace azure2023-mix-dev.csv.gz
"""

from oserve.study.experiment import capacity, measured, ratio, scene, setup, tell, words

POLICIES = (
    *("static-default", "static-default-rr", "static-best", "static-best-tuned"),
    *("aibrix", "llmd", "oserve-shapes", "oserve-assign", "oserve-static"),
)
CLUSTERS = ("2x8xH100", "1x8xH100+1x8xA100-80", "1x8xH200+1x8xA100-80")


def main() -> None:
    asked = setup(__doc__ or "", duration_s=600.0, models=("llama-2-70b",))
    requests = asked.requests()
    print(f"SimulatedTraffic: {asked.words}.")
    for model in asked.models:
        scenes = [scene(asked, model, cluster, requests, name=cluster) for cluster in CLUSTERS]
        found = measured(asked, scenes, POLICIES)
        tell(
            f"{model}: capacity",
            ("policy", *CLUSTERS),
            [[name, *(f"{capacity(rows[name]):.2f}" for rows in found)] for name in POLICIES],
        )
        tell(
            "oserve-static over each: capacity / P99 E2E at the knee of static-best",
            ("policy", *CLUSTERS),
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
