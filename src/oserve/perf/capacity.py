"""The capacity of a replica for one workload type that it serves exclusively.

A model of continuous batching with chunked prefill in the steady state. With ``d`` sequences
decoding, a decode-only step takes ``t(d)``, and each new request adds the marginal time ``c(d)`` of
its prompt. A request occupies its slot for ``O - 1`` steps, so requests complete at the rate

    r(d) = d / ((O - 1) t(d) + d c(d))        and a step lasts  tpot(d) = t(d) / (1 - r(d) c(d)).

``d`` is an average and may be below one. It is bounded by ``max_num_seqs``, by the KV cache, and by
the chunk budget, which holds the decoding tokens and the prompt tokens that arrive meanwhile. With
pipeline parallelism there are as many concurrent micro-batches as stages, each with its share of
the sequences.

TTFT at a rate is the time of the prompt's own steps plus the wait for earlier prompts, the tail of
an M/D/1 queue: exp(-2 (1 - load) wait / service). TPOT varies between requests, most for short
outputs: a binomial number of their O - 1 steps also computes a chunk of another request's prompt,
and takes longer the larger the chunk budget. The capacity within SLOs is the greatest rate at which
95 % of requests meet each limit. The model covers steady flow; the simulator covers bursts and
mixes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from oserve.core import Precision, ReplicaShape
from oserve.perf.roofline import Floats, StepModel
from oserve.perf.sequence_cache import SequenceCache

# The share of requests that must meet their limits, and that quantile of the standard normal.
ATTAINMENT = 0.95
_Z = 1.645
# A replica must hold this many requests of a type at once; with fewer, preemptions dominate.
MIN_RESIDENT = 8
_GRID = 32
# Averages below one sequence: requests with long prompts and short answers rarely decode.
_RARE = np.geomspace(0.02, 1.0, 8, endpoint=False)
_HALVINGS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyLimits:
    """Limits of latency in seconds, ``None`` for no limit, and of precision, none for any."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None
    precisions: tuple[Precision, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TypeLoad:
    """The requests of one type: mean lengths, latency limits, and the longest that must fit."""

    prompt_tokens: float
    output_tokens: float
    limits: LatencyLimits = LatencyLimits()
    longest_tokens: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """The capacity of one shape for one type. ``why`` names its bound, or why it is 0.

    ``ttft_s`` (95th percentile) and ``tpot_s`` (mean) apply at capacity; ``latency_s`` is the
    end-to-end latency at half of it. Infinite if the shape cannot serve the type.
    """

    capacity_rps: float
    ttft_s: float
    tpot_s: float
    latency_s: float
    why: str


def capacities(
    step: StepModel,
    shape: ReplicaShape,
    kv_tokens: int,
    loads: Sequence[TypeLoad],
    cache: SequenceCache | None = None,
) -> list[Capacity]:
    """The capacity for each load; ``kv_tokens`` is the size of the replica's KV cache.

    ``cache``: how sequences take it, where that is not by tokens alone.
    """
    flow = _Flow(step, shape, kv_tokens, loads, cache)
    found = []
    for index, load in enumerate(loads):
        if load.limits.precisions and shape.precision not in load.limits.precisions:
            found.append(_never(f"its tier excludes {shape.precision}"))
        elif not _holds(load, kv_tokens, cache):
            found.append(_never(f"room for {kv_tokens:,} tokens of KV cache is less than it needs"))
        else:
            found.append(flow.best(index))
    return found


def _holds(load: TypeLoad, kv_tokens: int, cache: SequenceCache | None) -> bool:
    """Whether there is room for the longest request, and for some usual ones at once."""
    longest, usual = load.longest_tokens, _whole(load)
    if cache is None:
        return kv_tokens >= max(longest, MIN_RESIDENT * usual)
    return bool(
        cache.sequences(longest, longest) >= 1 and cache.sequences(usual, usual) >= MIN_RESIDENT
    )


def _whole(load: TypeLoad) -> float:
    return max(1.0, load.prompt_tokens) + max(1.0, load.output_tokens)


def _never(why: str) -> Capacity:
    return Capacity(capacity_rps=0.0, ttft_s=math.inf, tpot_s=math.inf, latency_s=math.inf, why=why)


class _Flow:
    """Steady flows of every load over a grid of decoding sequences: arrays [load, point].

    All values are per micro-batch; there is one per pipeline stage.
    """

    def __init__(
        self,
        step: StepModel,
        shape: ReplicaShape,
        kv_tokens: int,
        loads: Sequence[TypeLoad],
        cache: SequenceCache | None,
    ) -> None:
        self._loads = loads
        self._stages = shape.pipeline_parallel_size
        chunk = float(shape.max_num_batched_tokens)
        prompt = np.array([[max(1.0, load.prompt_tokens)] for load in loads])
        output = np.array([[max(1.0, load.output_tokens)] for load in loads])
        held = resident(kv_tokens, prompt, output, cache)
        self._bounds = {
            "max_num_seqs": np.full_like(prompt, shape.max_num_seqs / self._stages),
            "KV cache": held / self._stages,
            "chunk budget": chunk * (output - 1) / (prompt + output - 1),
        }
        most = np.minimum.reduce(list(self._bounds.values()))
        most = np.clip(most, 1.0, max(1.0, chunk - 1.0))
        often = most ** np.linspace(0.0, 1.0, _GRID)
        decoding = np.concatenate([np.repeat(_RARE[None, :], len(loads), axis=0), often], axis=1)
        alone = output <= 1
        decoding = np.where(alone, 0.0, decoding)
        # A step holds at least one whole sequence.
        busy = np.where(alone, 0.0, np.maximum(1.0, decoding))
        base = step.step_s(0.0, 0.0, busy, busy * (prompt + output / 2))
        each, pieces = prompt_cost_s(step, busy, base, prompt, output, chunk)
        # vLLM admits requests by their present cache size. Admitted requests still grow by half
        # their output; vLLM preempts those that no longer fit and computes them again.
        again = np.where(held < shape.max_num_seqs, (output / 2) / (prompt + output / 2), 0.0)
        cost = each * (1.0 + again)
        decoded = np.maximum(decoding, 1e-9)
        flowing = decoding / ((output - 1) * base + decoded * cost)
        self._rate = np.where(alone, _prompts_alone(step, prompt, chunk, shape), flowing)
        self._tpot = np.where(alone, 0.0, base / np.maximum(1e-9, 1.0 - self._rate * cost))
        self._slow = self._tpot + _tail_s(self._rate, self._tpot, each, pieces, output - 1)
        self._service = pieces * base + each
        self._output = output

    def best(self, index: int) -> Capacity:
        """The capacity for one load: the greatest rate within its limits."""
        limits = self._loads[index].limits
        slow, service = self._slow[index], self._service[index]
        rate, lowered = _within_ttft(self._rate[index], service, limits.ttft_s)
        good = rate > 0
        if limits.tpot_s is not None:
            good &= slow <= limits.tpot_s
        if limits.e2e_s is not None:
            steps = max(0.0, float(self._output[index, 0]) - 1)
            good &= service + wait_s(rate, service) + steps * slow <= limits.e2e_s
        if not good.any():
            return self._unmet(index, limits)
        best = int(np.argmax(np.where(good, rate, 0.0)))
        half = int(np.argmin(np.abs(self._rate[index] - rate[best] / 2)))
        wait = wait_s(rate[best : best + 1], service[best : best + 1])
        return Capacity(
            capacity_rps=float(self._stages * rate[best]),
            ttft_s=float(service[best] + wait[0]),
            tpot_s=float(self._tpot[index, best]),
            latency_s=float(service[half] + (self._output[index, 0] - 1) * self._tpot[index, half]),
            why=self._why(index, best, bool(lowered[best]), good),
        )

    def _why(self, index: int, best: int, lowered: bool, good: np.ndarray) -> str:
        if lowered:
            return "TTFT"
        if best + 1 < len(good) and not good[best + 1]:
            return "TPOT"
        if self._output[index, 0] <= 1:
            return "computing prompts"
        return min(self._bounds, key=lambda name: float(self._bounds[name][index, 0]))

    def _unmet(self, index: int, limits: LatencyLimits) -> Capacity:
        """The capacity 0, with the limit that fails at any rate and the best possible value."""
        ttft, tpot = float(self._service[index, 0]), float(self._slow[index, 0])
        why = f"TPOT is {tpot * 1e3:,.1f} ms at best"
        if limits.ttft_s is not None and ttft > limits.ttft_s:
            why = f"TTFT is {ttft * 1e3:,.0f} ms at best"
        return Capacity(capacity_rps=0.0, ttft_s=ttft, tpot_s=tpot, latency_s=math.inf, why=why)


def _prompts_alone(step: StepModel, prompt: Floats, chunk: float, shape: ReplicaShape) -> Floats:
    """The rate of one-token requests: each step holds as many prompts as the chunk budget."""
    together = np.clip(chunk / prompt, 1.0, shape.max_num_seqs / shape.pipeline_parallel_size)
    pieces = np.ceil(prompt / chunk)
    tokens = together * prompt / pieces
    rate: Floats = together / (pieces * step.step_s(tokens, tokens * prompt / 2, 0.0, 0.0))
    return rate


def resident(
    kv_tokens: float, prompt: Floats, output: Floats, cache: SequenceCache | None = None
) -> Floats:
    """The average number of sequences in the cache; on average half of their output is cached."""
    if cache is not None:
        return cache.sequences(prompt + output / 2, prompt + output)
    return kv_tokens / (prompt + output / 2)


def prompt_cost_s(
    step: StepModel, decoding: Floats, base: Floats, prompt: Floats, output: Floats, chunk: float
) -> tuple[Floats, Floats]:
    """The time that a prompt adds to the steps that compute it, and the number of these steps.

    Arrays of the shape of ``decoding``.
    """
    room = np.maximum(1.0, chunk - decoding)
    pieces = np.ceil(prompt / room)
    cached = decoding * (prompt + output / 2)
    # Token i attends to i tokens: half of the square, spread over the chunks.
    with_piece = step.step_s(prompt / pieces, prompt * prompt / 2 / pieces, decoding, cached)
    return pieces * (with_piece - base), pieces


def _tail_s(rate: Floats, tpot: Floats, each: Floats, pieces: Floats, steps: Floats) -> Floats:
    """The 95th percentile of TPOT less its mean (normal approximation of the binomial)."""
    shared = np.minimum(1.0, rate * pieces * tpot)
    spread = np.sqrt(shared * (1.0 - shared) / np.maximum(1.0, steps))
    tail: Floats = np.minimum(_Z * spread, 1.0 - shared) * each / pieces
    return tail


def wait_s(rate: Floats, service: Floats) -> Floats:
    """The 95th percentile of the wait for earlier prompts, in seconds."""
    load = np.minimum(rate * service, 0.999)
    tail = np.log(np.maximum(load, 1e-9) / (1 - ATTAINMENT))
    waits: Floats = np.maximum(0.0, service * tail / (2 * (1 - load)))
    return waits


def _within_ttft(rate: Floats, service: Floats, ttft_s: float | None) -> tuple[Floats, np.ndarray]:
    """Rates lowered to meet the TTFT (0 where none does), and where they were lowered."""
    if ttft_s is None:
        return rate, np.zeros(len(rate), dtype=bool)
    fits = wait_s(rate, service) + service <= ttft_s
    low, high = np.zeros_like(rate), rate.copy()
    if not fits.all():
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            holds = wait_s(middle, service) + service <= ttft_s
            low, high = np.where(holds, middle, low), np.where(holds, high, middle)
    lowered = np.where(service <= ttft_s, low, 0.0)
    return np.where(fits, rate, lowered), ~fits


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosedLoop:
    """Rate, TTFT without a queue, and TPOT at a fixed number of requests in flight."""

    rate_rps: float
    ttft_s: float
    tpot_s: float


def closed_loop(
    step: StepModel,
    shape: ReplicaShape,
    kv_tokens: int,
    *,
    inflight: float,
    prompt_tokens: float,
    output_tokens: float,
    cache: SequenceCache | None = None,
) -> ClosedLoop:
    """What a benchmark observes that keeps ``inflight`` requests of one length running."""
    prompt, output = np.array([max(1.0, prompt_tokens)]), np.array([max(2.0, output_tokens)])
    stages = shape.pipeline_parallel_size
    chunk = float(shape.max_num_batched_tokens)
    held = float(resident(kv_tokens, prompt, output, cache)[0])
    room = min(inflight, shape.max_num_seqs, held) / stages
    decoding = np.array([max(room, 1e-6)])
    for _ in range(20):
        base = step.step_s(0.0, 0.0, decoding, decoding * (prompt + output / 2))
        each, pieces = prompt_cost_s(step, decoding, base, prompt, output, chunk)
        rate = decoding / ((output - 1) * base + decoding * each)
        # Requests in prefill occupy a slot without decoding.
        first = pieces * base + each
        decoding = 0.5 * decoding + 0.5 * np.maximum(room - rate * first, room * 0.05)
    tpot = base / np.maximum(1e-9, 1.0 - rate * each)
    return ClosedLoop(
        rate_rps=float(stages * rate[0]), ttft_s=float(first[0]), tpot_s=float(tpot[0])
    )
