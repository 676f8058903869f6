"""A model's class is looked at in the process that asks."""

from collections.abc import Callable
from typing import TypeVar

from oserve.engines.patches.patch import Patch, PatchTarget

Inspected = TypeVar("Inspected")


def _here(_original: object) -> Callable[[Callable[[], Inspected]], Inspected]:
    def run(inspect: Callable[[], Inspected]) -> Inspected:
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
        "vLLM inspects a model's class in a new process, so that the inspection does not "
        "initialise a GPU. On CPU that only costs another import of vLLM, some 12 s. The patch "
        "inspects the class in the calling process."
    ),
    without="the first engine of each model family starts more slowly",
    upstream=(
        "[#19317](https://github.com/vllm-project/vllm/issues/19317), open, asks for an option. "
        "Since then vLLM caches the result in a file, so that only the first start is slow"
    ),
)
