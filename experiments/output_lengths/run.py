"""What knowing output lengths is worth to a router: unknown, class means, the estimator, the truth.

The first third of the trace is learned (means, classes, the estimator's past), the rest measured.
The published account of llm-d: output-length buckets cut P95 E2E by 9 %.

    python experiments/output_lengths/run.py --trace azure2023-mix-dev.csv.gz --models opt-30b
"""

from dataclasses import fields

from oserve.evaluate.simulator import Levers, Routing, SimulatedServing
from oserve.study.beliefs import (
    BELIEFS,
    ESTIMATED,
    KNOWN,
    UNKNOWN,
    BeliefOutcome,
    Beliefs,
    recovered,
)
from oserve.study.experiment import scene, setup, tell
from oserve.study.scene import USUAL_CHUNK
from oserve.study.tune import Tuner

_LEAST_WORK = Levers(routing=Routing.LEAST_WORK)
_HEADS = ("capacity", "P95 E2E, s", "P99 E2E, s", "P99 TTFT, s", "imbalance")
_NAMES = [item.name for item in fields(BeliefOutcome)]
_SHARE = "share of the gap that the estimator closes"


def deployments(tuner: Tuner) -> dict[str, tuple[SimulatedServing, bool]]:
    """Of the smallest form; half of the devices with the next larger one; the same with pools."""
    shapes = [s for s in tuner.forms([USUAL_CHUNK]) if s.pipeline_parallel_size == 1]
    small, large = sorted(shapes, key=lambda shape: shape.device_count)[:2]
    devices = len(tuner.scene.devices)
    alike = tuner.deployed([(small, devices // small.device_count)], _LEAST_WORK)
    halves = [(shape, devices // 2 // shape.device_count) for shape in (small, large)]
    mixed = tuner.deployed(halves, _LEAST_WORK)
    return {
        f"{alike.plan.id}, least work": (alike, False),
        f"{mixed.plan.id}, least work": (mixed, False),
        f"{mixed.plan.id}, pools by answer": (mixed, True),
    }


def cells(row: BeliefOutcome) -> list[str]:
    return [
        f"{row.capacity_scale:.2f}",
        f"{row.p95_e2e_s:.1f}",
        f"{row.p99_e2e_s:.1f}",
        f"{row.p99_ttft_s:.2f}",
        f"{row.imbalance:.2f}",
    ]


def shares(rows: dict[str, BeliefOutcome]) -> list[str]:
    """The share closed of each figure; of the capacity, more is better."""
    told = []
    for name in _NAMES:
        sign = -1.0 if name == "capacity_scale" else 1.0
        three = [sign * getattr(rows[belief], name) for belief in (UNKNOWN, ESTIMATED, KNOWN)]
        told.append(recovered(*three))
    return told


def main() -> None:
    asked = setup(__doc__ or "", duration_s=900.0, models=("opt-30b", "llama-2-70b"))
    requests = asked.requests()
    tenants = [request.session or request.model for request in requests]
    print(f"Traffic: {asked.words}. 16 H100. Latencies: mean over 0.9 to 1.1 of the capacity.")
    for model in asked.models:
        tuner = Tuner(scene(asked, model, "2x8xH100", requests, learn_s=asked.duration_s / 3.0))
        for name, (serving, pools) in deployments(tuner).items():
            told = Beliefs(tuner, serving, tenants, pools=pools)
            knee = told.capacity(UNKNOWN)
            rows = {belief: told.measure(belief, capacity=knee) for belief in BELIEFS}
            lines = [[belief, *cells(row)] for belief, row in rows.items()]
            if any(tenants):
                blind = Beliefs(tuner, serving, [""] * len(tenants), pools=pools)
                by_prompt = blind.measure(ESTIMATED, capacity=knee)
                lines.append(["estimated by prompt alone", *cells(by_prompt)])
            lines.append([_SHARE, *shares(rows)])
            tell(f"{model}: {name}", ("output lengths", *_HEADS), lines)


if __name__ == "__main__":
    main()
