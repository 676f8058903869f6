"""Settings of the engines."""

from collections.abc import Mapping
from typing import Annotated

import msgspec

Positive = Annotated[float, msgspec.Meta(gt=0)]
Count = Annotated[int, msgspec.Meta(ge=1)]


class EngineSettings(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """How vLLM engines are started, watched and ended.

    ``variants``: precision (``fp8``, ``int8``, ``int4``) to the path or name of a checkpoint of the
    same model in that precision. ``kv_cache_memory_bytes``: per device, where the shape names none;
    unset or 0, it follows from memory and context on CPU and is left to vLLM on GPUs (see
    ``room``). ``enforce_eager``: skip compilation; unset means
    on CPU only. ``max_model_len``: tokens; unset leaves the model's own. ``start_method``:
    ``zygote`` forks engines from one process that has imported vLLM, ``spawn`` starts each from
    nothing, ``auto`` takes the first on CPU.
    ``hang_after_s``: an engine that shows no sign of life for so long is ended, at the earliest;
    one that may be at a long step after ``hang_steps`` times the longest known (see
    ``control.progress``). It is looked at each ``health_interval_s``; an answer may take
    ``health_timeout_s``. ``stop_grace_s``: from TERM to KILL.
    ``orphan_grace_s``: for how long engines are held when the server was killed, until another one
    takes them up. ``keep_weights``: as they were loaded, beside what kernels made of them, so that
    they can go to other engines while this one serves; on CPU a second copy of them in memory.
    ``move_caches``: KV caches of running requests can go to other engines, on CPU.
    ``log_dir``: one file per replica; unset means ``logs`` in the run folder.
    """

    variants: Mapping[str, str] = {}
    kv_cache_memory_bytes: Annotated[int, msgspec.Meta(ge=0)] | None = None
    enforce_eager: bool | None = None
    max_model_len: Count | None = None
    start_method: Annotated[str, msgspec.Meta(pattern="^(auto|zygote|spawn)$")] = "auto"
    start_timeout_s: Positive = 300.0
    health_interval_s: Positive = 1.0
    health_timeout_s: Positive = 5.0
    hang_after_s: Annotated[float, msgspec.Meta(ge=1)] = 10.0
    hang_steps: Annotated[float, msgspec.Meta(ge=1)] = 4.0
    stop_grace_s: Positive = 10.0
    stable_s: Positive = 60.0
    orphan_grace_s: Annotated[float, msgspec.Meta(ge=0)] = 60.0
    keep_weights: bool = True
    move_caches: bool = True
    log_dir: str = ""

    def method(self, *, on_cpu: bool) -> str:
        """How engines are started, ``zygote`` or ``spawn``."""
        if self.start_method != "auto":
            return self.start_method
        # Forking is safe only while the parent has not touched the GPU: not tried there.
        return "zygote" if on_cpu else "spawn"
