"""Gain over static deployments against the spread of the mix (presets S1 to S5).

The mix is synthetic in any case: four types in the corners of Azure's lengths, whose shares rotate
with a set coefficient of variation. The paper: 1.14x at 0.112, 2.66x at 0.688.

    python experiments/spread/run.py
"""

from oserve.study.experiment import capacity, measured, ratio, scene, setup, tell, words
from oserve.traces import MIX_CVS, synthesise_mix

POLICIES = (
    *("static-default", "static-best", "static-best-chunk", "static-best-tuned"),
    *("oserve-shapes", "oserve-assign", "oserve-static"),
)
PAPER = {"S1": "1.14x", "S5": "2.66x"}
_RATE_RPS = 8.0
_CHANGE_S = 150.0


def main() -> None:
    asked = setup(__doc__ or "", duration_s=600.0, models=("llama-2-70b",))
    for model in asked.models:
        scenes = []
        for name, spread in MIX_CVS.items():
            requests = list(
                synthesise_mix(
                    rate_rps=_RATE_RPS,
                    duration_s=asked.duration_s,
                    seed=asked.seed,
                    mix_cv=spread,
                    change_period_s=_CHANGE_S,
                )
            )
            scenes.append(scene(asked, model, "2x8xH100", requests, name=f"{name} ({spread:g})"))
        found = measured(asked, scenes, POLICIES)
        heads = ["policy", *(item.name for item in scenes)]
        tell(
            f"{model}, 16 H100: capacity",
            heads,
            [[name, *(f"{capacity(rows[name]):.2f}" for rows in found)] for name in POLICIES],
        )
        tell(
            "oserve-static over each: capacity / P99 E2E at the knee of static-best",
            heads,
            [
                *(
                    [name, *(ratio(rows["oserve-static"], rows[name]) for rows in found)]
                    for name in POLICIES[:-1]
                ),
                ["paper, over static", *(PAPER.get(name, "") for name in MIX_CVS)],
                ["deployment", *(words(rows["oserve-static"]) for rows in found)],
            ],
        )


if __name__ == "__main__":
    main()
