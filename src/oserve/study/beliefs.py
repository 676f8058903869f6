"""The router's expected output lengths, and what they are worth.

A belief is the number of output tokens that the router expects of each request. Beliefs are learned
on the first part of a scene and measured on the rest. The estimator works in the order of time: at
each arrival it knows the learned part and the requests that have ended by then, nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from oserve.core import LengthClass
from oserve.evaluate.simulator import (
    Floats,
    Ints,
    Routing,
    SimulatedServing,
    SimulatedTraffic,
    class_indices,
    largest_scale,
)
from oserve.sim.results import FleetResults
from oserve.sim.types import Status
from oserve.study.tune import Tuner
from oserve.workload.output import KnownAtArrival, OutputEstimator

UNKNOWN, CLASS_MEAN, ESTIMATED, KNOWN = "unknown", "class mean", "estimated", "known"
BELIEFS = (UNKNOWN, CLASS_MEAN, ESTIMATED, KNOWN)
"""The mean of all requests; of the length class; of the live estimator; the true length."""

NEAR_KNEE = (0.9, 0.95, 1.0, 1.05, 1.1)
"""Latencies are means over these multiples of a capacity, since the tail of one run is noise."""

_WINDOW_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BeliefOutcome:
    """The capacity as a rate scale, and latencies near the knee in seconds.

    ``imbalance``: the standard deviation over the mean of the work that replicas get in ten
    seconds, in engine seconds; averaged over time.
    """

    capacity_scale: float
    p95_e2e_s: float
    p99_e2e_s: float
    p99_ttft_s: float
    imbalance: float


def estimated_outputs(
    traffic: SimulatedTraffic,
    finish_s: Floats,
    *,
    tenants: Sequence[str],
    learned: SimulatedTraffic | None = None,
    learned_tenants: Sequence[str] = (),
) -> Ints:
    """The output tokens that the live estimator expects of each request at its arrival.

    ``finish_s``: when each request ends; NaN if it never does. ``learned``: earlier requests.
    """
    estimator = OutputEstimator()
    if learned is not None:
        past = _known(learned, learned_tenants)
        for item, output in zip(past, learned.output_tokens.tolist(), strict=True):
            estimator.learn(item, output)
    known = _known(traffic, tenants)
    outputs = traffic.output_tokens.tolist()
    order = [int(i) for i in np.argsort(finish_s, kind="stable") if np.isfinite(finish_s[i])]
    expected = np.empty(len(traffic), dtype=np.int64)
    ended = 0
    for number, arrival_s in enumerate(traffic.arrival_s.tolist()):
        while ended < len(order) and finish_s[order[ended]] <= arrival_s:
            done = order[ended]
            estimator.learn(known[done], outputs[done])
            ended += 1
        expected[number] = max(1, round(estimator.expect(known[number]).mean_tokens))
    return expected


class Beliefs:
    """Runs of one serving with different beliefs, on the traffic after the learned part.

    ``tenants``: the sender of each request of the scene, empty if unknown. ``pools``: requests with
    long expected answers go to the replicas that are larger than the first, in soft pools. If all
    expected answers are equally long there is one pool.
    """

    def __init__(
        self,
        tuner: Tuner,
        serving: SimulatedServing,
        tenants: Sequence[str],
        *,
        pools: bool = False,
    ) -> None:
        scene = tuner.scene
        start_s = scene.learn_s or 0.0
        first = int(np.searchsorted(scene.traffic.arrival_s, start_s))
        self._tuner = tuner
        self._learned = scene.traffic.between(0.0, start_s)
        self._traffic = scene.traffic.between(start_s, float("inf"))
        self._learned_tenants, self._tenants = tenants[:first], tenants[first:]
        self._classes = serving.plan.length_classes
        self._pools = pools
        self._serving = _pooled(serving) if pools else serving
        self._ends: dict[float, Floats] = {}

    def expected(self, belief: str, scale: float) -> Ints:
        """The expected tokens of each request, for traffic ``scale`` times as fast."""
        traffic = self._traffic
        if belief == KNOWN:
            return traffic.output_tokens
        if belief == UNKNOWN:
            mean = max(1, round(float(self._tuner.scene.learned.output_tokens.mean())))
            return np.full(len(traffic), mean, dtype=np.int64)
        usual = np.array([item.output_tokens for item in self._classes], dtype=np.int64)
        by_class = usual[class_indices(self._classes, traffic.prompt_tokens)]
        if belief == CLASS_MEAN:
            return by_class
        fast = traffic.faster(scale)
        if scale not in self._ends:
            # Requests end at nearly the same times whatever the routing: take a run by class means.
            self._ends[scale] = self._run(by_class, fast).finish_s
        return estimated_outputs(
            fast,
            self._ends[scale],
            tenants=self._tenants,
            learned=self._learned,
            learned_tenants=self._learned_tenants,
        )

    def measure(self, belief: str, *, capacity: float) -> BeliefOutcome:
        """Measure a belief; latencies near ``capacity``, a rate scale."""
        rows = []
        for at in NEAR_KNEE:
            traffic = self._traffic.faster(at * capacity)
            results = self._run(self.expected(belief, at * capacity), traffic)
            done = results.status == Status.COMPLETED
            first = (results.first_token_s - results.arrival_s)[done]
            whole = (results.finish_s - results.arrival_s)[done]
            p95, p99 = np.quantile(whole, (0.95, 0.99)).tolist()
            ttft = float(np.quantile(first, 0.99))
            rows.append((p95, p99, ttft, self._imbalance(results, traffic)))
        p95, p99, ttft, imbalance = np.mean(rows, axis=0).tolist()
        return BeliefOutcome(
            capacity_scale=self.capacity(belief, start=capacity),
            p95_e2e_s=p95,
            p99_e2e_s=p99,
            p99_ttft_s=ttft,
            imbalance=imbalance,
        )

    def capacity(self, belief: str, *, start: float = 1.0) -> float:
        """The largest rate scale within the SLO."""
        scene, simulator = self._tuner.scene, self._tuner.simulator

        def holds(at: float) -> bool:
            expected = self.expected(belief, at)
            return simulator.holds(
                self._serving,
                self._traffic.faster(at),
                scene.slo,
                expected=expected,
                kinds=self._kinds(expected),
            )

        return largest_scale(holds, start=start)

    def _run(self, expected: Ints, traffic: SimulatedTraffic) -> FleetResults:
        return self._tuner.simulator.run(
            self._serving, traffic, expected=expected, kinds=self._kinds(expected)
        )

    def _kinds(self, expected: Ints) -> Ints | None:
        """The pool of each request: 0 for short answers, 1 for long ones, 2 for no pool.

        The work is divided between the two pools as the devices are.
        """
        if not self._pools:
            return None
        if expected.min() == expected.max():
            return np.full(len(expected), 2, dtype=np.int64)
        shapes = [spec.shape for spec in self._serving.plan.replicas]
        own = sum(s.device_count for s in shapes if s.device_count == shapes[0].device_count)
        costs = self._tuner.simulator.costs(shapes[0])
        work = (
            self._traffic.prompt_tokens * costs.prefill_s_per_token
            + expected * costs.decode_s_per_token
        )
        order = np.argsort(expected, kind="stable")
        total = np.cumsum(work[order])
        share = own / sum(s.device_count for s in shapes)
        kinds = np.ones(len(expected), dtype=np.int64)
        kinds[order[: int(np.searchsorted(total, total[-1] * share))]] = 0
        return kinds

    def _imbalance(self, results: FleetResults, traffic: SimulatedTraffic) -> float:
        shapes = [spec.shape for spec in self._serving.plan.replicas]
        costs = [self._tuner.simulator.costs(shape) for shape in shapes]
        on, served = results.replica, results.replica >= 0
        prefill = np.array([cost.prefill_s_per_token for cost in costs])
        decode = np.array([cost.decode_s_per_token for cost in costs])
        work = traffic.prompt_tokens * prefill[on] + traffic.output_tokens * decode[on]
        windows = (traffic.arrival_s // _WINDOW_S).astype(np.int64)
        table = np.zeros((int(windows.max()) + 1, len(shapes)))
        np.add.at(table, (windows[served], on[served]), work[served])
        mean = table.mean(axis=1)
        busy = mean > 0.0
        return float((table.std(axis=1)[busy] / mean[busy]).mean())


def recovered(unknown: float, estimated: float, known: float, *, least: float = 0.03) -> str:
    """The share of the gap between unknown and known that the estimate closes.

    Smaller numbers are better. A gap of less than ``least`` of the unknown counts as none.
    """
    gap = unknown - known
    if abs(gap) < least * abs(unknown):
        return "no gap"
    if gap < 0.0:
        return "knowing is worse"
    return f"{(unknown - estimated) / gap:.0%}"


def _known(traffic: SimulatedTraffic, tenants: Sequence[str]) -> list[KnownAtArrival]:
    return [
        KnownAtArrival(prompt_tokens=prompt, tenant=tenant)
        for prompt, tenant in zip(traffic.prompt_tokens.tolist(), tenants, strict=True)
    ]


def _pooled(serving: SimulatedServing) -> SimulatedServing:
    """A serving with a pool of small and one of large replicas, and a class without pool."""
    replicas = serving.plan.replicas
    least = replicas[0].shape.device_count
    short = [spec.id for spec in replicas if spec.shape.device_count == least]
    long = [spec.id for spec in replicas if spec.shape.device_count != least]
    names = ("short answers", "long answers", "any")
    plan = replace(
        serving.plan,
        length_classes=tuple(
            LengthClass(name=name, max_prompt_tokens=bound)
            for name, bound in zip(names, (1, 2, None), strict=True)
        ),
        routing_shares={
            names[0]: dict.fromkeys(short, 1.0 / len(short)),
            names[1]: dict.fromkeys(long, 1.0 / len(long)),
        },
    )
    return replace(serving, plan=plan, levers=replace(serving.levers, routing=Routing.POOLS))
