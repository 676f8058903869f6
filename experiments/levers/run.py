"""Every lever alone, on the best homogeneous deployment, and all together.

python experiments/levers/run.py --trace azure2023-mix-dev.csv.gz
"""

from oserve.study.experiment import scene, setup, tell
from oserve.study.levers import lever_capacities


def main() -> None:
    asked = setup(__doc__ or "", duration_s=900.0, models=("opt-66b", "llama-2-70b"))
    requests = asked.requests()
    print(f"Traffic: {asked.words}. 16 H100, capacity and gain over static-best.")
    found = {
        model: lever_capacities(scene(asked, model, "2x8xH100", requests)) for model in asked.models
    }
    names = list(next(iter(found.values())))
    base = {model: scales["static-best"] for model, scales in found.items()}
    tell(
        "Levers",
        ("lever", *asked.models),
        [
            [
                name,
                *(f"{found[m][name]:.2f} ({found[m][name] / base[m]:.2f}x)" for m in asked.models),
            ]
            for name in names
        ],
    )


if __name__ == "__main__":
    main()
