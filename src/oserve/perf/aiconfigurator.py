"""Optional step times from NVIDIA's aiconfigurator, which interpolates measurements.

Needs the package ``aiconfigurator-core`` in exactly the version below, since the interface changes
between releases. It covers A100, H100, H200, B200 and L40S. OServe does not use its TTFT, which
ignores load.
"""

import importlib
from typing import Any

import numpy as np

from oserve.core import OServeError, Precision, ReplicaShape
from oserve.perf.roofline import Floats

VERSION = "0.12.0"
SYSTEMS = {
    "A100-80": "a100_sxm",
    "H100": "h100_sxm",
    "H200": "h200_sxm",
    "B200": "b200_sxm",
    "L40S": "l40s",
}
_MODELS = {
    "llama-3.1-8b": "meta-llama/Meta-Llama-3.1-8B",
    "llama-3.1-70b": "meta-llama/Meta-Llama-3.1-70B",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-1.7b": "Qwen/Qwen3-1.7B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "qwen3-32b": "Qwen/Qwen3-32B",
    "mixtral-8x7b": "mistralai/Mixtral-8x7B-v0.1",
}
_QUANTISED = {
    Precision.BF16: "bfloat16",
    Precision.FP16: "bfloat16",
    Precision.FP8: "fp8",
}
# The A100's tables are available only through an alias.
_TABLE = {"a100_sxm": "current"}
_VLLM = "0.24.0"


class AiConfigurator:
    """A step model (see ``roofline.StepModel``) for one model, device kind and shape."""

    def __init__(self, model: str, device_kind: str, shape: ReplicaShape) -> None:
        system = SYSTEMS.get(device_kind)
        quantised = _QUANTISED.get(shape.precision)
        path = _MODELS.get(model)
        if system is None or quantised is None or path is None:
            raise OServeError(
                f"aiconfigurator has no data for {model} in {shape.precision} on {device_kind}",
                place="--perf",
                remedy="use the roofline: --perf roofline",
            )
        self._engine = _sdk("engine").EngineHandle.compile(
            path,
            system,
            "vllm",
            backend_version=_TABLE.get(system, _VLLM),
            tp_size=shape.tensor_parallel_size,
            pp_size=shape.pipeline_parallel_size,
            gemm_quant_mode=quantised,
        )

    def step_s(
        self,
        prefill_tokens: Floats | float,
        attended_tokens: Floats | float,
        decode_seqs: Floats | float,
        kv_tokens: Floats | float,
    ) -> Floats:
        """See ``roofline.StepModel``."""
        loads = np.broadcast_arrays(prefill_tokens, attended_tokens, decode_seqs, kv_tokens)
        flat = [np.asarray(item, dtype=np.float64).ravel() for item in loads]
        seconds = [self._one(*row) for row in zip(*flat, strict=True)]
        return np.array(seconds).reshape(loads[0].shape)

    def _one(self, prompt: float, attended: float, decoding: float, cached: float) -> float:
        sequences = max(1, round(decoding))
        context = cached / decoding if decoding > 0 else 0.0
        if prompt <= 0:
            milliseconds = self._engine.decode_step_latency(sequences, max(1, round(context)), 2)
        else:
            # The interface has one prompt length, for attention and for the decoding contexts.
            length = max(1, round(2 * attended / prompt))
            output = max(2, round(2 * (context - length)))
            milliseconds = self._engine.mixed_step_latency(
                max(1, round(prompt)), round(decoding), length, output
            )
        return float(milliseconds) / 1e3


def _sdk(name: str) -> Any:
    try:
        return importlib.import_module(f"aiconfigurator_core.sdk.{name}")
    except ImportError:
        raise OServeError(
            "the package aiconfigurator-core is not installed",
            place="--perf aiconfigurator",
            remedy=f"pip install aiconfigurator-core=={VERSION}, or use --perf roofline",
        ) from None
