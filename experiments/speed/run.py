"""Gain against how fast the mix changes (T1 slow to T4 fast), with and without switching.

Settings are searched on the first tenth only, in hindsight for nobody: what follows is new to every
policy, so switching has something to win. The paper: 1.23x to 1.98x over static vLLM.

    python experiments/speed/run.py
"""

from oserve.study.experiment import capacity, measured, ratio, scene, setup, tell
from oserve.traces import CHANGE_PERIODS_S, synthesise_mix

POLICIES = (
    *("static-default", "static-best", "static-best-tuned", "reload"),
    *("oserve-static", "oserve", "oracle"),
)
PAPER = {"T1": "1.23x", "T4": "1.98x"}
_RATE_RPS = 6.0
_SPREAD = 0.688


def main() -> None:
    asked = setup(__doc__ or "", duration_s=1500.0, models=("llama-2-70b",))
    for model in asked.models:
        scenes = []
        for name, period_s in CHANGE_PERIODS_S.items():
            requests = list(
                synthesise_mix(
                    rate_rps=_RATE_RPS,
                    duration_s=asked.duration_s,
                    seed=asked.seed,
                    mix_cv=_SPREAD,
                    change_period_s=period_s,
                )
            )
            scenes.append(
                scene(
                    asked,
                    model,
                    "2x8xH100",
                    requests,
                    name=f"{name} ({period_s:g} s)",
                    learn_s=asked.duration_s / 10,
                )
            )
        found = measured(asked, scenes, POLICIES)
        heads = ["policy", *(item.name for item in scenes)]
        tell(
            f"{model}, 16 H100: capacity (switches at the knee)",
            heads,
            [
                [
                    name,
                    *(f"{capacity(rows[name]):.2f} ({rows[name].switches})" for rows in found),
                ]
                for name in POLICIES
            ],
        )
        tell(
            "oserve over each: capacity / P99 E2E at the knee of static-best",
            heads,
            [
                *(
                    [name, *(ratio(rows["oserve"], rows[name]) for rows in found)]
                    for name in POLICIES
                    if name != "oserve"
                ),
                ["paper, over static", *(PAPER.get(name, "") for name in CHANGE_PERIODS_S)],
            ],
        )


if __name__ == "__main__":
    main()
