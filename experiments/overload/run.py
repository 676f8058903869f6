"""Goodput at 1 to 2 times a deployment's capacity, with and without demotion and shedding.

python experiments/overload/run.py --trace azure2023-mix-dev.csv.gz
"""

from oserve.study.experiment import Setup, scene, setup, tell
from oserve.study.overload import goodput_at_capacity, steady_scale, table
from oserve.study.tune import MeasuredServing, Tuner
from oserve.traces import TraceRequest

LOADS = (1.0, 1.25, 1.5, 2.0)


def tell_all(tuner: Tuner, found: MeasuredServing, title: str) -> None:
    base = goodput_at_capacity(tuner, found)
    steady = steady_scale(tuner, found.serving)
    title += f", {found.serving.plan.id}: SLO capacity {found.scale:.2f} ({base:.1f} requests/s in "
    title += f"time), steady throughput {steady / found.scale:.2f} times that"
    unit = base / found.scale
    for words, scales, whole in (
        ("capacity", [found.scale * at for at in LOADS], base),
        ("steady throughput", [steady * at for at in LOADS], unit * steady),
    ):
        rows = table(tuner, found, scales)
        heads = [f"{at:g}x" for at in LOADS]
        tell(
            f"{title}. Loads in multiples of the {words}; goodput as a multiple of it / P99 TTFT "
            "of those served, s / shed",
            ("defence", *heads),
            [
                [
                    name,
                    *(
                        f"{at.goodput_rps / whole:.2f} / {at.p99_ttft_s:.1f} / {at.shed:.0%}"
                        for at in row
                    ),
                ]
                for name, row in rows.items()
            ],
        )
        if words == "capacity":
            kinds = [item.name for item in found.serving.plan.length_classes]
            tell(
                f"Who is in time at {LOADS[-1]:g}x (shed), by prompt length",
                ("defence", *kinds),
                [
                    [
                        name,
                        *(
                            f"{good:.0%} ({shed:.0%})"
                            for good, shed in zip(
                                row[-1].met_by_class, row[-1].shed_by_class, strict=True
                            )
                        ),
                    ]
                    for name, row in rows.items()
                ],
            )


def one(asked: Setup, model: str, requests: list[TraceRequest]) -> None:
    tuner = Tuner(scene(asked, model, "2x8xH100", requests))
    bounds = [item.max_prompt_tokens for item in tuner.scene.demand.classes]
    print(f"\nPrompt length classes of {model}: up to {bounds} tokens.")
    tell_all(tuner, tuner.best, f"{model}, static-best")
    tell_all(tuner, tuner.best_tuned, f"{model}, static-best-tuned")


def main() -> None:
    asked = setup(__doc__ or "", duration_s=900.0, models=("opt-66b", "llama-2-70b"))
    requests = asked.requests()
    print(f"SimulatedTraffic: {asked.words}. 16 H100.")
    for model in asked.models:
        one(asked, model, requests)


if __name__ == "__main__":
    main()
