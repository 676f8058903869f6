"""The power of a replica's devices, from the facts of the device kind and what the replica did.

A device draws ``idle_w`` without any process and ``context_w`` from the start of an engine's
process until its end, whatever the engine holds in memory. While it decodes, its power is affine in
log2 of the sequences per tensor-parallel rank, through the two measured points, since a rank does
only its share of a step and waits for the others. Prompts are bound by compute and draw ``max_w``.
Two means over the interval are enough for that: the batch, which is generated tokens per step, and
the share of the computing time that prompts take, by their costs.

The logarithm is concave, so the mean batch of an interval in which the load changes much overrates
the power: sum over shorter intervals there.
"""

from dataclasses import dataclass

from oserve.core import EngineWork, ReplicaShape
from oserve.perf.costs import TokenCosts
from oserve.perf.device import PowerFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaWork:
    """What a replica did in some interval.

    ``busy_s``: seconds for which each of its devices computed. ``prompt_tokens`` were computed,
    recomputation included, ``generated_tokens`` in ``steps`` steps of the engine.
    """

    busy_s: float = 0.0
    prompt_tokens: float = 0.0
    generated_tokens: float = 0.0
    steps: float = 0.0

    @property
    def batch(self) -> float:
        """Mean sequences per step that generate a token."""
        return self.generated_tokens / self.steps if self.steps > 0 else 0.0


def work_between(before: EngineWork, after: EngineWork, shape: ReplicaShape) -> ReplicaWork:
    """The work between two observations of an engine; nothing if it counted anew in between.

    Engines time the gaps between steps that follow on each other, through all pipeline stages.
    """
    steps, gaps = after.steps - before.steps, after.gaps - before.gaps
    if steps <= 0 or gaps < 0 or after.output_tokens < before.output_tokens:
        return ReplicaWork()
    step_s = (after.gap_s - before.gap_s) / gaps if gaps > 0 else 0.0
    return ReplicaWork(
        busy_s=max(0.0, steps * step_s) / shape.pipeline_parallel_size,
        prompt_tokens=max(0, after.prompt_tokens - before.prompt_tokens),
        generated_tokens=after.output_tokens - before.output_tokens,
        steps=steps,
    )


def replica_power_w(
    power: PowerFacts, costs: TokenCosts, shape: ReplicaShape, work: ReplicaWork, seconds: float
) -> float:
    """Mean watts of all devices of a started replica over ``seconds`` in which it did ``work``."""
    if seconds <= 0:
        return shape.device_count * power.context_w
    busy_s = min(seconds, work.busy_s)
    prefill_s = min(busy_s, work.prompt_tokens * costs.prefill_s_per_token)
    # A step that decodes has at least one sequence; steps of prompts alone do not.
    per_rank = max(1.0, work.batch) / shape.tensor_parallel_size
    joules = (
        (seconds - busy_s) * power.context_w
        + (busy_s - prefill_s) * power.decode_w(per_rank)
        + prefill_s * power.max_w
    )
    return shape.device_count * joules / seconds
