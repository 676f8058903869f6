"""Settings of the engines."""

from collections.abc import Mapping
from typing import Annotated

import msgspec

Positive = Annotated[float, msgspec.Meta(gt=0)]
Count = Annotated[int, msgspec.Meta(ge=1)]


class EngineSettings(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """How vLLM engines are started, monitored and ended.

    ``variants``: precision (``fp8``, ``int8``, ``int4``) to the path or name of a checkpoint of the
    same model in that precision. ``kv_cache_memory_bytes``: per device, if the shape names none;
    unset or 0, it follows from memory and context on CPU, and vLLM chooses it on GPUs (see
    ``memory_check``). ``enforce_eager``: skip compilation; unset: on CPU only. ``max_model_len``:
    tokens; unset: the model's own. ``start_method``: ``zygote`` forks engines from one process
    that has imported vLLM, ``spawn`` starts a new interpreter for each, ``auto`` means ``zygote``
    on CPU and ``spawn`` on GPUs.

    ``hang_after_s``: an engine without a sign of life for so long is ended, at the earliest; an
    engine that may be at a long step is ended after ``hang_steps`` times the longest known one (see
    ``control.progress``). It is probed every ``health_interval_s``; an answer may take
    ``health_timeout_s``. ``stop_grace_s``: from TERM to KILL. ``stable_s``: after so long without
    a break its failures are forgotten. ``orphan_grace_s``: how long the keeper holds engines after
    the server was killed, for another server to take them over.

    ``keep_weights``: keep them as loaded, beside what kernels have made of them, so that they can
    move to other engines while this one serves; on CPU they then take memory twice.
    ``move_caches``: KV caches of running requests can move to other engines, on CPU. ``log_dir``:
    for one file per replica; unset means ``logs`` in the run folder.
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
        """The start method: ``zygote`` or ``spawn``."""
        if self.start_method != "auto":
            return self.start_method
        # Forking is safe only while the parent has not used the GPU; not tested there.
        return "zygote" if on_cpu else "spawn"
