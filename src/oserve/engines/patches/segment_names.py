"""Names of shared memory that tell which engine owns it."""

import os

from oserve.engines.group import SHARED_MEMORY_PREFIX
from oserve.engines.patches.patch import Patch, PatchTarget

_SOURCE = "multiprocessing.shared_memory:_make_filename"
_DIGEST = "a86e5d8af2d61014"
_NAME_LENGTH = 40


def _own(_original: object) -> str:
    return f"/{SHARED_MEMORY_PREFIX}{os.getpid()}_"


def _long(_original: object) -> int:
    return _NAME_LENGTH


SEGMENT_NAMES = Patch(
    name="segment-names",
    stage="engine",
    made_for="Python 3.11",
    targets=(
        PatchTarget(
            place="multiprocessing.shared_memory:_SHM_NAME_PREFIX",
            source=_SOURCE,
            digest=_DIGEST,
            replace=_own,
        ),
        PatchTarget(
            place="multiprocessing.shared_memory:_SHM_SAFE_NAME_LENGTH",
            source=_SOURCE,
            digest=_DIGEST,
            replace=_long,
        ),
    ),
    reason=(
        "Python gives shared memory random names, so that no process can tell which engine owns a "
        "segment that a killed engine has left in /dev/shm. The patch puts the engine's process "
        "id into the names, and OServe frees the segments of engines that have ended."
    ),
    without="shared memory of killed engines may stay in /dev/shm until it is removed by hand",
    upstream="only the code that creates a segment can name it, which here is vLLM",
)
