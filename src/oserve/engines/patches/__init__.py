"""What OServe replaces in vLLM, and in Python, while a process runs: all of it is here.

One small module each says what is replaced, in which version, why, and what is known upstream;
``PATCHES`` lists them and ``apply`` puts them in place. Whatever the version, a patch is applied
only where the code that it replaces reads as it did when the patch was written. Else it is left out
with a line in the log, or, where engines cannot be started so without it, refused.

No other module of OServe assigns to a foreign one. It does not import vLLM by being imported.
"""

from oserve.engines.patches.applying import PATCHES, VLLM, apply
from oserve.engines.patches.installed import engine_package, left_out
from oserve.engines.patches.patch import Patch, PatchError, PatchTarget, Stage

__all__ = [
    "PATCHES",
    "VLLM",
    "Patch",
    "PatchError",
    "PatchTarget",
    "Stage",
    "apply",
    "engine_package",
    "left_out",
]
