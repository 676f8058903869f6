"""Engine seconds per token: from step times, or a prior before anything is measured."""

from dataclasses import dataclass, replace

from oserve.core import Precision, ReplicaShape
from oserve.perf.roofline import StepModel

# Orders of magnitude only: the router corrects them within seconds by observation, and only the
# ratio between replicas matters to it.
_BASE_S = {"cpu": (1 / 4000, 1 / 400)}
_ACCELERATOR_S = (1 / 12000, 1 / 2000)
_PRECISION = {
    Precision.FP32: 1.5,
    Precision.BF16: 1.0,
    Precision.FP16: 1.0,
    Precision.FP8: 0.65,
    Precision.INT8: 0.65,
    Precision.INT4: 0.7,
}
# A further device in a tensor-parallel group adds less than one device's speed.
_PARALLEL_EXPONENT = 0.85
_USUAL_CONTEXT = 512.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCosts:
    """Engine seconds that one prompt token and one output token occupy in a full batch.

    ``kv_bytes_per_token``: KV cache of one token over all devices; 0 if unknown.
    """

    prefill_s_per_token: float
    decode_s_per_token: float
    kv_bytes_per_token: float = 0.0

    def at(self, speed: float) -> "TokenCosts":
        """The costs at ``speed`` times the speed."""
        return replace(
            self,
            prefill_s_per_token=self.prefill_s_per_token / speed,
            decode_s_per_token=self.decode_s_per_token / speed,
        )


def measured_costs(step: StepModel, shape: ReplicaShape) -> TokenCosts:
    """Costs from step times: a full prompt chunk, and a full batch decoding at a usual context."""
    chunk, seqs = float(shape.max_num_batched_tokens), float(shape.max_num_seqs)
    stages = shape.pipeline_parallel_size
    batch = max(1.0, min(seqs, chunk) / stages)
    prefill_s = float(step.step_s(chunk, chunk * chunk / 2, 0.0, 0.0))
    decode_s = float(step.step_s(0.0, 0.0, batch, batch * _USUAL_CONTEXT))
    # There are as many concurrent micro-batches as stages.
    return TokenCosts(
        prefill_s_per_token=prefill_s / chunk / stages,
        decode_s_per_token=decode_s / batch / stages,
    )


def token_costs(shape: ReplicaShape, device_kind: str) -> TokenCosts:
    """A prior for a shape on a kind of device."""
    prefill_s, decode_s = _BASE_S.get(device_kind, _ACCELERATOR_S)
    factor = _PRECISION[shape.precision] / shape.device_count**_PARALLEL_EXPONENT
    return TokenCosts(prefill_s_per_token=prefill_s * factor, decode_s_per_token=decode_s * factor)
