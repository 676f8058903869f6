"""Step times as integer tables, made from any step model.

    step = prompts[n + d] + joint[d]    n > 0 prompt tokens with d decoding sequences
    step = decodes[d]                   only decoding
    ... + kv_rate * (tokens that decoding attends to) + pair_rate * (query-key pairs of prompts)

Times are picoseconds; ``pair_rate`` is in 1/1024 of a picosecond. This is exact for step models
that are affine in both and treat tokens of prompts and of decoding alike, as the roofline is.
Tables of other models are exact at a usual context.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oserve.core import ReplicaShape
from oserve.perf.roofline import StepModel
from oserve.sim.layout import PAIR_BITS, PS

Ints = NDArray[np.int64]

_USUAL_CONTEXT = 1024.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTables:
    """``prompts`` [budget + 1], ``joint`` and ``decodes`` [most sequences + 1]: picoseconds.

    Entry 0 has no meaning. ``kv_rate``: ps per token; ``pair_rate``: 1/1024 ps per pair.
    """

    prompts: Ints
    joint: Ints
    decodes: Ints
    kv_rate: int
    pair_rate: int

    def seconds(self, prompt: int, attended: int, decoding: int, cached: int) -> float:
        """As ``StepModel.step_s``, for whole numbers within the tables."""
        if prompt > 0:
            whole = int(self.prompts[prompt + decoding] + self.joint[decoding])
        else:
            whole = int(self.decodes[decoding])
        parts = self.kv_rate * cached + ((self.pair_rate * attended) >> PAIR_BITS)
        return (whole + parts) / PS


def step_tables(
    model: StepModel, shape: ReplicaShape, *, overhead_s: float = 0.0, factor: float = 1.0
) -> StepTables:
    """Sample ``model`` within the limits of ``shape``.

    Every step takes ``factor`` times the model's time, and ``overhead_s`` more.
    """

    def seconds(
        prompt: NDArray[Any], context: float, decoding: NDArray[Any], cache: float
    ) -> NDArray[np.float64]:
        got = model.step_s(prompt, prompt * context / 2, decoding, decoding * cache)
        return np.asarray(got, dtype=np.float64) * factor + overhead_s

    budget = shape.max_num_batched_tokens
    most = min(shape.max_num_seqs, budget)
    usual, nothing = _USUAL_CONTEXT, np.zeros(1)
    some, many = np.array([float(max(1, most // 2))]), np.array([float(max(1, budget // 2))])
    kv_s = _slope(
        seconds(nothing, 0.0, some, usual), seconds(nothing, 0.0, some, 3 * usual), 2 * usual * some
    )
    pair_s = _slope(
        seconds(many, usual, nothing, 0.0), seconds(many, 3 * usual, nothing, 0.0), usual * many
    )
    tokens = np.arange(1.0, budget + 1)
    seqs = np.arange(1.0, most + 1)
    prompts = seconds(tokens, usual, np.zeros(budget), 0.0) - pair_s * tokens * usual / 2
    decodes = seconds(np.zeros(most), 0.0, seqs, usual) - kv_s * seqs * usual
    # With so many prompt tokens, as far as the tables reach.
    beside = np.maximum(1.0, np.minimum(many, budget - seqs))
    mixed = seconds(beside, usual, seqs, usual)
    mixed = mixed - pair_s * beside * usual / 2 - kv_s * seqs * usual
    reach = np.minimum(beside + seqs, budget).astype(np.int64)
    joint = mixed - prompts[reach - 1]
    return StepTables(
        prompts=_with_zero(prompts),
        joint=_with_zero(joint),
        decodes=_with_zero(decodes),
        kv_rate=round(kv_s * PS),
        pair_rate=round(pair_s * (PS << PAIR_BITS)),
    )


def _slope(low: NDArray[np.float64], high: NDArray[np.float64], by: NDArray[np.float64]) -> float:
    return max(0.0, float((high[0] - low[0]) / by[0]))


def _with_zero(seconds: NDArray[np.float64]) -> Ints:
    return np.concatenate([[0], np.round(seconds * PS)]).astype(np.int64)
