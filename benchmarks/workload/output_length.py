"""How well the length of an answer is told before it exists, on a trace, each request once.

    .venv/bin/python benchmarks/workload/output_length.py TRACE [--limit 50000]

Every estimator sees a request's prompt, tells, and only then learns its output; the first tenth is
not counted. "class mean" is the running mean of outputs within four prompt-length classes of equal
counts, "histogram" the running mean per doubling of the prompt, "estimator" OServe's. Traces carry
no tenants and no limits, so only prompts can tell here. "work" is the error of the sum over any 20
requests in a row, which is what a replica's queue is made of; "bits" is the surprise per answer.
"""

import argparse
import math
import statistics
import time
from collections import defaultdict

from oserve.traces import read_trace
from oserve.workload.output import KnownAtArrival, OutputEstimator, length_bin

TOGETHER = 20


class Means:
    """Running means per key."""

    def __init__(self) -> None:
        self.sums: dict[int, float] = defaultdict(float)
        self.counts: dict[int, int] = defaultdict(int)

    def tell(self, key: int) -> float:
        return self.sums[key] / self.counts[key] if self.counts[key] else 128.0

    def learn(self, key: int, output: int) -> None:
        self.sums[key] += output
        self.counts[key] += 1


def errors(told: list[float], actual: list[int]) -> tuple[float, float, float]:
    """Mean absolute error in tokens, median factor, and relative error of sums of 20."""
    mae = statistics.fmean(abs(t - a) for t, a in zip(told, actual, strict=True))
    factor = 2 ** statistics.median(
        abs(math.log2(t / max(1, a))) for t, a in zip(told, actual, strict=True)
    )
    sums = [
        abs(sum(told[i : i + TOGETHER]) / max(1, sum(actual[i : i + TOGETHER])) - 1)
        for i in range(0, len(told) - TOGETHER, TOGETHER)
    ]
    return mae, factor, statistics.fmean(sums)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace")
    parser.add_argument("--limit", type=int, default=50_000)
    wanted = parser.parse_args()
    requests = [r for r in read_trace(wanted.trace, limit=wanted.limit) if r.output_tokens > 0]
    prompts = sorted(r.prompt_tokens for r in requests)
    bounds = [prompts[len(prompts) * i // 4] for i in (1, 2, 3)]
    overall, classes, doublings = Means(), Means(), Means()
    estimator = OutputEstimator()
    told: dict[str, list[float]] = defaultdict(list)
    bits, spent_s = [], 0.0
    for request in requests:
        prompt, output = request.prompt_tokens, request.output_tokens
        kind, doubling = sum(prompt > bound for bound in bounds), round(math.log2(prompt + 1))
        known = KnownAtArrival(prompt_tokens=prompt)
        begin_s = time.perf_counter()
        expected = estimator.expect(known)
        told["estimator"].append(expected.mean_tokens)
        estimator.learn(known, output)
        spent_s += time.perf_counter() - begin_s
        told["mean of all"].append(overall.tell(0))
        told["class mean"].append(classes.tell(kind))
        told["histogram"].append(doublings.tell(doubling))
        bits.append(-math.log2(max(1e-12, expected.probabilities[length_bin(output)])))
        for means, key in ((overall, 0), (classes, kind), (doublings, doubling)):
            means.learn(key, output)
    skip = len(requests) // 10
    actual = [r.output_tokens for r in requests][skip:]
    print(f"{len(requests):,} requests; {1e6 * spent_s / len(requests):.0f} us per request")
    print(f"{'':>12} | {'MAE tokens':>10} | {'median factor':>13} | work of {TOGETHER}")
    for name, values in told.items():
        mae, factor, work = errors(values[skip:], actual)
        print(f"{name:>12} | {mae:10.1f} | {factor:13.2f} | {100 * work:7.1f} %")
    print(f"surprise of the estimator: {statistics.fmean(bits[skip:]):.2f} bits an answer")


if __name__ == "__main__":
    main()
