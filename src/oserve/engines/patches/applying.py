"""All patches, in the order in which ``apply`` applies them."""

import sys
from collections.abc import Callable, Sequence

from oserve.engines.patches.blank_weights import BLANK_WEIGHTS
from oserve.engines.patches.forked_workers import FORKED_WORKERS
from oserve.engines.patches.kept_weights import KEPT_WEIGHTS
from oserve.engines.patches.kernel_overrides import KERNEL_OVERRIDES
from oserve.engines.patches.model_inspection import MODEL_INSPECTION
from oserve.engines.patches.patch import Patch, PatchError, PatchStage, misfit, put_in_place
from oserve.engines.patches.pipeline_buffer import PIPELINE_BUFFER
from oserve.engines.patches.segment_names import SEGMENT_NAMES
from oserve.engines.patches.waiting import WAITING

VLLM = "vLLM 0.32.0"
"""The version whose sources the patches were written against."""

PATCHES: tuple[Patch, ...] = (
    MODEL_INSPECTION,
    FORKED_WORKERS,
    KERNEL_OVERRIDES,
    WAITING,
    SEGMENT_NAMES,
    PIPELINE_BUFFER,
    KEPT_WEIGHTS,
    BLANK_WEIGHTS,
)

_applied: set[str] = set()


def _to_log(text: str) -> None:
    print(f"oserve: {text}", file=sys.stderr, flush=True)


def apply(
    stage: PatchStage,
    patches: Sequence[Patch] = PATCHES,
    *,
    say: Callable[[str], None] = _to_log,
) -> None:
    """Apply the patches of a stage, each once per process; ``say`` receives those left out.

    Raises PatchError if a needed one does not fit.
    """
    for patch in patches:
        if patch.stage != stage or patch.name in _applied or not patch.wanted():
            continue
        reason = misfit(patch)
        if reason and patch.needed:
            raise PatchError(f"patch {patch.name}: {reason}; {patch.without}")
        if reason:
            say(f"patch {patch.name} is left out: {reason}; {patch.without}")
            continue
        for target in patch.targets:
            put_in_place(target)
        _applied.add(patch.name)
