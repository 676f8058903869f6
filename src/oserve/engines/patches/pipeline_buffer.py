"""The buffer of later pipeline stages, on CPU."""

from collections.abc import Callable
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from oserve.engines.patches.patch import Patch, PatchTarget
from oserve.engines.patches.platforms import on_cpu

P = ParamSpec("P")
Gathered = TypeVar("Gathered")


class _Stage(Protocol):
    """A model that receives hidden states from the stage before it."""

    def make_empty_intermediate_tensors(
        self, *, batch_size: int, dtype: object, device: object
    ) -> object: ...


class _ModelConfig(Protocol):
    dtype: object


class _Runner(Protocol):
    """vLLM's model runner."""

    intermediate_tensors: object | None
    model: _Stage
    max_num_tokens: int
    model_config: _ModelConfig
    device: object


def _allocating(
    original: Callable[Concatenate[_Runner, P], Gathered],
) -> Callable[Concatenate[_Runner, P], Gathered]:
    def sync_and_gather(self: _Runner, /, *arguments: P.args, **named: P.kwargs) -> Gathered:
        if self.intermediate_tensors is None:
            self.intermediate_tensors = self.model.make_empty_intermediate_tensors(
                batch_size=self.max_num_tokens,
                dtype=self.model_config.dtype,
                device=self.device,
            )
        return original(self, *arguments, **named)

    return sync_and_gather


PIPELINE_BUFFER = Patch(
    name="pipeline-buffer",
    stage="worker",
    made_for="vLLM 0.32.0",
    wanted=on_cpu,
    targets=(
        PatchTarget(
            place=(
                "vllm.v1.worker.cpu_model_runner:"
                "CPUModelRunner.sync_and_gather_intermediate_tensors"
            ),
            source=(
                "vllm.v1.worker.gpu_model_runner:"
                "GPUModelRunner.sync_and_gather_intermediate_tensors"
            ),
            digest="01b895f381511029",
            replace=_allocating,
        ),
    ),
    reason=(
        "Only the dummy run allocates the buffer in which a later pipeline stage receives its "
        "input. On CPU vLLM skips that run when execution is eager and the KV cache size is "
        "given, as OServe does, and the first request ends the engine with an AssertionError. The "
        "patch allocates the buffer on first use."
    ),
    without="engines with pipeline stages may end at their first request",
    upstream="no report found",
)
