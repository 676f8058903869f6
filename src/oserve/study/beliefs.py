"""What a router believes of output lengths, and what comes of it."""

from dataclasses import dataclass

import numpy as np

from oserve.app.simulated import Ints, Serving, Traffic, largest_scale
from oserve.sim.words import Status
from oserve.study.tune import Tuner

BELIEFS = ("unknown", "estimated", "known")
"""The mean of all requests; the mean of the prompt's length class; the truth."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Believed:
    """Capacity (a rate scale), and seconds at the scale that was asked for."""

    capacity_scale: float
    p95_e2e_s: float
    p50_ttft_s: float


def expected_outputs(belief: str, traffic: Traffic) -> Ints | None:
    """Tokens expected of each request; ``None``: those of its class."""
    if belief == "known":
        return traffic.output_tokens
    if belief == "estimated":
        return None
    mean = max(1, round(float(traffic.output_tokens.mean())))
    return np.full(len(traffic), mean, dtype=np.int64)


def believed(tuner: Tuner, serving: Serving, belief: str, *, scale: float) -> Believed:
    """A serving whose router has that belief."""
    scene, simulator = tuner.scene, tuner.simulator
    traffic = scene.traffic
    expected = expected_outputs(belief, traffic)

    def holds(at: float) -> bool:
        return simulator.holds(serving, traffic.faster(at), scene.slo, expected=expected)

    results = simulator.run(serving, traffic.faster(scale), expected=expected)
    done = results.status == Status.COMPLETED
    first = (results.first_token_s - results.arrival_s)[done]
    whole = (results.finish_s - results.arrival_s)[done]
    return Believed(
        capacity_scale=largest_scale(holds, start=scale),
        p95_e2e_s=float(np.quantile(whole, 0.95)),
        p50_ttft_s=float(np.quantile(first, 0.5)),
    )
