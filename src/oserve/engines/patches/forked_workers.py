"""Workers on CPU are forked, as the engine was."""

import os
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from oserve.engines.patches.patch import Patch, PatchTarget

P = ParamSpec("P")
Checked = TypeVar("Checked")


def _forking(original: Callable[P, Checked]) -> Callable[P, Checked]:
    def check_and_update_config(*arguments: P.args, **named: P.kwargs) -> Checked:
        checked = original(*arguments, **named)
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
        return checked

    return check_and_update_config


FORKED_WORKERS = Patch(
    name="forked-workers",
    stage="zygote",
    made_for="vLLM 0.32.0",
    needed=True,
    targets=(
        PatchTarget(
            place="vllm.platforms.cpu:CpuPlatform.check_and_update_config",
            digest="43fdc40c8fef51b1",
            replace=_forking,
        ),
    ),
    reason=(
        "vLLM's CPU platform always sets VLLM_WORKER_MULTIPROC_METHOD to spawn, so that each "
        "engine core and worker imports vLLM again: three quarters of a minute. OServe forks them "
        "from a process with one thread that has imported vLLM, which is safe. The patch sets the "
        "variable back to fork."
    ),
    without="each engine starts a new interpreter instead (engines.start_method: spawn)",
    upstream=(
        "on purpose: OpenMP reads its variables when it is loaded, and fork is not safe in "
        "general ([#19649](https://github.com/vllm-project/vllm/pull/19649))"
    ),
)
