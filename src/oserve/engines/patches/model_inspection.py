"""A model's class is looked at in the process that asks."""

from collections.abc import Callable
from typing import TypeVar

from oserve.engines.patches.patch import Patch, PatchTarget

Found = TypeVar("Found")


def _here(_original: object) -> Callable[[Callable[[], Found]], Found]:
    def run(inspect: Callable[[], Found]) -> Found:
        return inspect()

    return run


MODEL_INSPECTION = Patch(
    name="model-inspection",
    stage="zygote",
    made_for="vLLM 0.32.0",
    targets=(
        PatchTarget(
            place="vllm.model_executor.models.registry:_run_in_subprocess",
            digest="e5c2127202ded41a",
            replace=_here,
        ),
    ),
    reason=(
        "vLLM looks at a model's class in a new process, lest doing so touch a GPU; on CPU that is "
        "one more import of vLLM, some 12 s, for nothing. The patch looks at it in place."
    ),
    without="the first engine of each model family takes longer to come up",
    upstream=(
        "[#19317](https://github.com/vllm-project/vllm/issues/19317), open, asks for an option. "
        "What was found is cached in a file since, so that only the first start pays"
    ),
)
