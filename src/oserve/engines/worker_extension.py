"""Loaded by every vLLM worker (``--worker-extension-cls``): mends pipeline parallelism on CPU.

The buffer in which a later pipeline stage receives its input is allocated by vLLM's dummy run only,
and on CPU that run is skipped when execution is eager and the KV cache size is given. The first
request would then end the engine. The buffer is allocated here on first use instead. On other
platforms this module does nothing.
"""

# What exists depends on the platform, which vLLM alone knows.
# ruff: noqa: PLC0415

from typing import Any


class WorkerExtension:
    """Mixed into the worker class by vLLM; adds nothing to it: importing this module is enough."""


def _mend_pipeline_parallel() -> None:
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    original = CPUModelRunner.sync_and_gather_intermediate_tensors

    def sync_and_gather(self: Any, *arguments: Any, **named: Any) -> Any:
        if self.intermediate_tensors is None:
            self.intermediate_tensors = self.model.make_empty_intermediate_tensors(
                batch_size=self.max_num_tokens,
                dtype=self.model_config.dtype,
                device=self.device,
            )
        return original(self, *arguments, **named)

    CPUModelRunner.sync_and_gather_intermediate_tensors = sync_and_gather


_mend_pipeline_parallel()
