"""vLLM's processes sleep while they wait for each other."""

import time
from collections.abc import Callable
from typing import Protocol

from oserve.engines.patches.patch import Patch, PatchTarget

_NAP_S = 0.0002
_ASK_AGAIN_MS = 100


class _SpinCondition(Protocol):
    """vLLM's; the times are in seconds."""

    last_read: float
    busy_loop_s: float


def _napping(
    original: Callable[[_SpinCondition, int], None],
) -> Callable[[_SpinCondition, int | None], None]:
    def wait(self: _SpinCondition, timeout_ms: int | None = None) -> None:
        if time.monotonic() <= self.last_read + self.busy_loop_s:
            time.sleep(_NAP_S)
        else:
            original(self, _ASK_AGAIN_MS if timeout_ms is None else min(timeout_ms, _ASK_AGAIN_MS))

    return wait


WAITING = Patch(
    name="waiting",
    stage="zygote",
    made_for="vLLM 0.32.0",
    targets=(
        PatchTarget(
            place="vllm.distributed.device_communicators.shm_broadcast:SpinCondition.wait",
            digest="68ef15b26ab57770",
            replace=_napping,
        ),
    ),
    reason=(
        "For a second after each message, vLLM's processes poll for the next one without pause "
        "and hold the interpreter's lock. On CPU they take these cores from the computation: an "
        "engine's core process took half of them. After that second they wait for a notification, "
        "which can get lost in processes that have just been forked, and poll again after five "
        "seconds. The patch makes them sleep 0.2 ms between polls, and poll again after 100 ms."
    ),
    without="idle engines take cores from engines that compute",
    upstream=(
        "[#52916](https://github.com/vllm-project/vllm/issues/52916), "
        "[#52814](https://github.com/vllm-project/vllm/pull/52814) and "
        "[#52848](https://github.com/vllm-project/vllm/pull/52848), all open, would make both "
        "times adjustable"
    ),
)
