"""Results of a simulated run by request, and as the outcomes of any other measurement."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from oserve.sim.types import Floats, Ints, Status
from oserve.traces import Outcome, OutcomeStatus, Slo, Summary, summarise

Mask = NDArray[np.bool_]

_FAILED = (Status.REFUSED, Status.SHED, Status.LOST)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaTotals:
    """Counters of one replica. ``busy_s``: seconds for which each of its devices computed.

    ``prompt_tokens`` counts computed tokens, recomputation included. ``kv_blocks`` is the size of
    its KV cache, ``kv_block_s`` the blocks that requests held, times seconds; ``kv_peak_blocks``
    the most at the end of a step, since ``SimulatedFleet.take_totals`` was last called.
    """

    busy_s: float
    prompt_tokens: int
    generated_tokens: int
    preemptions: int
    steps: int
    kv_blocks: int = 0
    kv_block_s: float = 0.0
    kv_peak_blocks: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FleetResults:
    """An entry per request; times are NaN for what did not happen.

    ``dispatch_s`` is the time of the last dispatch. ``replica`` indexes ``replica_names`` (the last
    replica of the request, or -1). ``status`` holds ``Status`` values, ``made_tokens`` output
    tokens so far, ``reused_tokens`` prompt tokens found in the cache. ``totals`` are per replica.
    ``tier``, ``tenant``: those of the requests, ``None`` without any. ``charged_s``: device-seconds
    that fair shares charged, by tenant.
    """

    now_s: float
    arrival_s: Floats
    dispatch_s: Floats
    first_token_s: Floats
    finish_s: Floats
    replica: Ints
    status: Ints
    preemptions: Ints
    replays: Ints
    prompt_tokens: Ints
    output_tokens: Ints
    made_tokens: Ints
    reused_tokens: Ints
    class_index: Ints
    tier: Ints | None
    replica_names: tuple[str, ...]
    totals: tuple[ReplicaTotals, ...]
    tenant: Ints | None = None
    charged_s: Floats = field(default_factory=lambda: np.zeros(0))

    def outcomes(self, mask: Mask | None = None) -> list[Outcome]:
        """Outcomes of requests that have arrived, or of those in ``mask``.

        Unfinished requests count as truncated. Single inter-token latencies are not kept.
        """
        chosen = self.status != Status.PENDING
        if mask is not None:
            chosen &= mask
        return [self._outcome(int(index)) for index in np.flatnonzero(chosen)]

    def summary(self, slo: Slo, mask: Mask | None = None) -> Summary:
        """Latencies, rates and goodput, as for any other replay."""
        return summarise(self.outcomes(mask), slo)

    def _outcome(self, index: int) -> Outcome:
        arrival_s, status = float(self.arrival_s[index]), int(self.status[index])
        end_s = float(self.finish_s[index])
        outcome = OutcomeStatus.TRUNCATED
        if status == Status.COMPLETED:
            outcome = OutcomeStatus.COMPLETED
        elif status in _FAILED:
            outcome = OutcomeStatus.FAILED
        else:
            end_s = self.now_s
        first_s = float(self.first_token_s[index])
        return Outcome(
            due_s=arrival_s,
            sent_s=arrival_s,
            ttft_s=(end_s if np.isnan(first_s) else first_s) - arrival_s,
            e2e_s=end_s - arrival_s,
            itl_s=(),
            prompt_tokens=int(self.prompt_tokens[index]),
            output_tokens=int(self.made_tokens[index]),
            status=outcome,
        )
