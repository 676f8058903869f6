"""Everything that OServe replaces in vLLM, and in Python, while a process runs.

Each patch is a small module that says what it replaces, in which version, why, and what is known
upstream. ``PATCHES`` lists them; ``apply`` applies them. A patch is applied only if the code that
it replaces still is the code that it was written for, whatever the version. Otherwise it is left
out with a line in the log, or, if engines need it, the process does not start.

No other module of OServe assigns to a foreign one. Importing this package does not import vLLM.
"""

from oserve.engines.patches.applying import PATCHES, VLLM, apply
from oserve.engines.patches.installed import engine_package, left_out
from oserve.engines.patches.patch import Patch, PatchError, PatchStage, PatchTarget

__all__ = [
    "PATCHES",
    "VLLM",
    "Patch",
    "PatchError",
    "PatchStage",
    "PatchTarget",
    "apply",
    "engine_package",
    "left_out",
]
