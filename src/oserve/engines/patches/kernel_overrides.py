"""Kernels are replaced once, before engines are forked."""

from collections.abc import Callable

from oserve.engines.patches.patch import Patch, PatchTarget


def _done_already(original: Callable[[object], None]) -> Callable[[object], None]:
    from vllm.platforms.cpu import CpuPlatform  # noqa: PLC0415 - not before it is asked

    original(CpuPlatform)

    def register_triton_kernel_overrides(_cls: object) -> None:
        return None

    return register_triton_kernel_overrides


KERNEL_OVERRIDES = Patch(
    name="kernel-overrides",
    stage="zygote",
    made_for="vLLM 0.32.0",
    targets=(
        PatchTarget(
            place="vllm.platforms.cpu:CpuPlatform.register_triton_kernel_overrides",
            digest="33b2b92b16ba15eb",
            replace=_done_already,
        ),
    ),
    reason=(
        "Each worker searches every loaded module for Triton kernels to replace by CPU kernels, "
        "which takes a second of CPU time. The patch does it once, in the zygote, whose forks "
        "inherit the result."
    ),
    without="each worker starts about a second later",
    upstream=(
        "the dispatcher is new ([#43048](https://github.com/vllm-project/vllm/pull/43048), "
        "[#45133](https://github.com/vllm-project/vllm/issues/45133)); no report of its cost "
        "found"
    ),
)
