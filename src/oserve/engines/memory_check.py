"""Whether engines fit in memory: sizes KV caches, and refuses what does not fit before it starts.

On CPU all engines share main memory: the size of a cache follows from the free memory and from the
model's context. On GPUs vLLM uses what its device has left, and this module checks that it is
enough. It does not check replicas whose own vLLM arguments set memory, context or types, nor models
of unknown size.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from oserve.core import Device, OServeError, ReplicaShape, ReplicaSpec, VllmBackend
from oserve.engines.main_memory import available_memory_bytes
from oserve.engines.settings import EngineSettings
from oserve.perf.known_models import find_model
from oserve.perf.kv_cache import (
    EngineMemory,
    blind_cache_bytes,
    cache_size,
    shared_cache_bytes,
)
from oserve.perf.memory import CPU_ENGINE_BYTES, GPU_ENGINE_BYTES, MEMORY_SHARE
from oserve.perf.model import ModelFacts

# Arguments of vLLM that change what fits.
_DECISIVE = (
    "--model",
    "--dtype",
    "--quantization",
    "--load-format",
    "--max-model-len",
    "--kv-cache-memory-bytes",
    "--kv-cache-dtype",
    "--gpu-memory-utilization",
    "--cpu-offload-gb",
    "--hf-overrides",
    "--block-size",
)
# Shorter contexts are of no use and are not proposed.
_LEAST_CONTEXT = 256
_SIZE = "engines.kv_cache_memory_bytes"
_CONTEXT = "engines.max_model_len"


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryCheck:
    """Devices of one kind, their memory, and the model to serve on them.

    ``free_bytes``: of main memory, for all engines together; unused on GPUs. ``model`` is ``None``
    if its sizes are unknown.
    """

    settings: EngineSettings
    devices: tuple[Device, ...]
    model: ModelFacts | None
    free_bytes: float

    @property
    def on_cpu(self) -> bool:
        return all(device.kind == "cpu" for device in self.devices)

    def sized(
        self, shapes: Sequence[ReplicaShape], specs: Iterable[ReplicaSpec] = ()
    ) -> tuple[EngineSettings, tuple[ReplicaShape, ...]]:
        """Settings with a cache size, and those of ``shapes`` that fit.

        ``shapes`` may run on any number of devices; ``specs`` are the replicas of a plan. A size
        that is set stays.
        """
        fitting = tuple(shape for shape in shapes if self._misses(shape) is None)
        if self.settings.kv_cache_memory_bytes or not self.on_cpu or not self.devices:
            return self.settings, fitting
        planned = [(spec.shape, spec.shape.device_count) for spec in specs if _is_judged(spec)]
        if not shapes and not planned:
            return self.settings, ()
        if self.model is None:
            size = blind_cache_bytes(self.free_bytes / len(self.devices))
            return self._with(size), tuple(shapes)
        memory = self._memory(self.free_bytes / len(self.devices), self.model)
        size = shared_cache_bytes(memory, self.free_bytes, planned)
        if shapes:
            found = cache_size(memory, [s for s in shapes if s.kv_cache_memory_bytes is None])
            kept = set(found.fitting)
            fitting = tuple(s for s in fitting if s.kv_cache_memory_bytes or s in kept)
            least = max((memory.request_bytes(shape) for shape, _ in planned), default=0)
            size = max(found.cache_bytes, least)
        return self._with(size), fitting

    def left_out(self, shapes: Iterable[ReplicaShape]) -> str:
        """One line on why these shapes are not used; empty if there are none."""
        first: dict[str, ReplicaShape] = {}
        for shape in shapes:
            first.setdefault(shape.name.rpartition("-")[0], shape)
        if not first:
            return ""
        error = self.refusal(next(iter(first.values())))
        return f"{', '.join(first)} left out: {error.message}"

    def closest(self, shapes: Sequence[ReplicaShape]) -> ReplicaShape:
        """Of shapes that do not fit, the one that lacks the least memory."""

        def missing(shape: ReplicaShape) -> float:
            memory = self._of(shape)
            if memory is None:
                return 0.0
            return memory.request_bytes(shape) - memory.room_bytes(shape)

        return min(shapes, key=missing)

    def refusal(self, shape: ReplicaShape, name: str = "") -> OServeError:
        """Why the shape does not fit, and what to set."""
        missed = self._misses(shape, name)
        if missed is not None:
            return missed
        memory = self._of(shape)
        if memory is None:
            return OServeError(
                f"{name or shape.name}: the model's sizes are unknown",
                place="memory",
                remedy="give a model whose sizes are known",
            )
        return self._crowded(memory, shape, name)

    def check(self, specs: Iterable[ReplicaSpec], place: str = "plan") -> None:
        """Raise ``OServeError`` for the first replica that cannot start, or for too many.

        The settings must have a cache size (see ``sized``).
        """
        specs = [spec for spec in specs if _is_judged(spec)]
        self.check_contexts(specs)
        if self.model is None or not specs:
            return
        if self.on_cpu:
            self._check_together(self._memory(self.free_bytes, self.model), specs, place)
            return
        for spec in specs:
            missed = self._missed_memory(spec.shape, f"replica {spec.id}")
            if missed is not None:
                raise missed

    def check_contexts(self, specs: Iterable[ReplicaSpec]) -> None:
        """Raise ``OServeError`` for the first replica whose set cache size holds no request."""
        for spec in specs:
            missed = self._missed_context(spec.shape, f"replica {spec.id}")
            if missed is not None and _is_judged(spec):
                raise missed

    def notes(self, specs: Iterable[ReplicaSpec]) -> tuple[str, ...]:
        """Notes for the user on the caches of these replicas; none on GPUs."""
        size = self.settings.kv_cache_memory_bytes
        shapes = [spec.shape for spec in specs if _is_judged(spec)]
        if not size or not self.on_cpu or not shapes:
            return ()
        if self.model is None:
            return (
                f"KV cache of {_gib(size)} a device: nothing is known of the model's sizes; if its "
                f"context does not fit, set {_CONTEXT} or {_SIZE}",
            )
        memory = self._memory(0.0, self.model)
        largest = max(shapes, key=memory.request_bytes)
        requests = size / memory.request_bytes(largest)
        return (
            f"KV cache of {_gib(size)} a device, for {requests:.1f} requests of the whole context "
            f"of {memory.context_tokens:,} tokens in {largest.precision}",
        )

    # -- what one replica needs -----------------------------------------------------------------
    def _memory(self, device_bytes: float, model: ModelFacts) -> EngineMemory:
        return EngineMemory(
            model=model,
            context_tokens=self.settings.max_model_len or model.max_model_len,
            device_bytes=device_bytes,
            copies=2 if self.on_cpu and self.settings.keep_weights else 1,
            engine_bytes=CPU_ENGINE_BYTES if self.on_cpu else GPU_ENGINE_BYTES,
        )

    def _of(self, shape: ReplicaShape) -> EngineMemory | None:
        """The memory of a shape's devices; ``None`` where it is not known."""
        if self.model is None:
            return None
        if self.on_cpu:
            return self._memory(self.free_bytes / len(self.devices), self.model)
        kinds = {device.kind: float(device.memory_bytes) for device in self.devices}
        own = kinds.get(shape.device_kind) or min(kinds.values(), default=0.0)
        return self._memory(own, self.model) if own else None

    def _set_bytes(self, shape: ReplicaShape) -> int:
        return shape.kv_cache_memory_bytes or self.settings.kv_cache_memory_bytes or 0

    def _misses(self, shape: ReplicaShape, name: str = "") -> OServeError | None:
        return self._missed_context(shape, name) or self._missed_memory(shape, name)

    def _missed_context(self, shape: ReplicaShape, name: str) -> OServeError | None:
        """The error of a set cache size that holds no request of the whole context."""
        memory, wanted = self._of(shape), self._set_bytes(shape)
        if memory is None or not wanted or memory.request_bytes(shape) <= wanted:
            return None
        need, context = memory.request_bytes(shape), memory.context_tokens
        remedies = [f"set {_SIZE} to at least {need}, or leave it out"]
        held = memory.held_tokens(shape, wanted)
        if held >= _LEAST_CONTEXT:
            remedies.append(f"set {_CONTEXT} to at most {held}")
        return OServeError(
            f"{name or shape.name}: one request of the whole context, {context:,} tokens, takes "
            f"{_gib(need)} of KV cache a device, and {_gib(wanted)} are set",
            place=_SIZE,
            remedy="; or ".join(remedies),
        )

    def _missed_memory(self, shape: ReplicaShape, name: str) -> OServeError | None:
        memory = self._of(shape)
        if memory is None:
            return None
        need = max(memory.request_bytes(shape), self._set_bytes(shape))
        return None if need <= memory.room_bytes(shape) else self._crowded(memory, shape, name)

    def _crowded(self, memory: EngineMemory, shape: ReplicaShape, name: str) -> OServeError:
        need = max(memory.request_bytes(shape), self._set_bytes(shape))
        where = "free" if self.on_cpu else "there"
        share = f", {len(self.devices)} of them sharing main memory" if self.on_cpu else ""
        return OServeError(
            f"{name or shape.name}: {_gib(memory.fixed_bytes(shape))} for weights and engine and "
            f"{_gib(need)} of KV cache for its context of {memory.context_tokens:,} tokens do not "
            f"fit a device with {_gib(memory.device_bytes * MEMORY_SHARE)} {where}{share}",
            place="memory",
            remedy="; or ".join(self._remedies(memory, shape)),
        )

    def _remedies(self, memory: EngineMemory, shape: ReplicaShape) -> list[str]:
        """Remedies, each of which suffices alone; if none does, what the machine lacks."""
        room = memory.room_bytes(shape)
        found = []
        if self._set_bytes(shape) > room >= memory.request_bytes(shape):
            found.append(f"set {_SIZE} to at most {int(room)}, or leave it out")
        held = memory.held_tokens(shape, room)
        if held >= _LEAST_CONTEXT and held < memory.context_tokens:
            found.append(f"set {_CONTEXT} to at most {held}")
        if not self.on_cpu:
            more = "use more devices a replica (tensor_parallel_size), or fewer bits a weight"
            return [*found, more]
        need = memory.request_bytes(shape)
        for slots in range(len(self.devices) - 1, shape.device_count - 1, -1):
            fewer = self._memory(self.free_bytes / slots, memory.model)
            if need <= fewer.room_bytes(shape):
                found.append(f"start fewer replicas: cluster.cpu_slots={slots}")
                break
        if memory.copies > 1:
            once = msgspec.structs.replace(self.settings, keep_weights=False)
            lean = with_settings(self, once)._of(shape)  # noqa: SLF001 (same class)
            if lean is not None and need <= lean.room_bytes(shape):
                found.append("set engines.keep_weights to false, without which weights do not move")
        if not found:
            total = (memory.fixed_bytes(shape) + need) * shape.device_count / MEMORY_SHARE
            found.append(
                f"free memory: one such replica needs {_gib(total)}, {_gib(self.free_bytes)} are "
                "free; or serve a smaller model, or one of fewer bits (engines.variants)"
            )
        return found

    # -- what all need together -----------------------------------------------------------------
    def _check_together(
        self, memory: EngineMemory, specs: Sequence[ReplicaSpec], place: str
    ) -> None:
        """Raise ``OServeError`` if the engines of a plan need more main memory than is free."""

        def total(cache: Mapping[str, int]) -> float:
            return sum(
                spec.shape.device_count * (memory.fixed_bytes(spec.shape) + cache[spec.id])
                for spec in specs
            )

        wanted = {spec.id: self._set_bytes(spec.shape) for spec in specs}
        usable = self.free_bytes * MEMORY_SHARE
        if total(wanted) <= usable:
            return
        least = {spec.id: memory.request_bytes(spec.shape) for spec in specs}
        remedies = []
        if total(least) <= usable:
            spare = usable - total(dict.fromkeys(wanted, 0))
            devices = sum(spec.shape.device_count for spec in specs)
            most = max(int(spare / devices), *least.values())
            if total(dict.fromkeys(wanted, most)) <= usable:
                remedies.append(f"set {_SIZE} to at most {most}")
        context = _common_context(memory, specs, usable)
        if context:
            out = f", and leave {_SIZE} out" if wanted != least else ""
            remedies.append(f"set {_CONTEXT} to at most {context}{out}")
        remedies.append("plan fewer replicas, or fewer bits a weight (engines.variants)")
        raise OServeError(
            f"{len(specs)} replicas need {_gib(total(wanted))} of main memory, and "
            f"{_gib(usable)} can be had",
            place=place,
            remedy="; or ".join(remedies),
        )

    def _with(self, cache_bytes: int) -> EngineSettings:
        return msgspec.structs.replace(self.settings, kv_cache_memory_bytes=cache_bytes or None)


def _common_context(memory: EngineMemory, specs: Sequence[ReplicaSpec], usable: float) -> int:
    """The longest context of which each replica can hold one request; 0 for none."""
    fixed = sum(spec.shape.device_count * memory.fixed_bytes(spec.shape) for spec in specs)
    devices = sum(spec.shape.device_count for spec in specs)
    each = (usable - fixed) / devices
    held = min(memory.held_tokens(spec.shape, each) for spec in specs)
    return held if _LEAST_CONTEXT <= held < memory.context_tokens else 0


def known_model(name: str) -> ModelFacts | None:
    """The sizes of a model; ``None`` if they are unknown, or without a name."""
    if not name:
        return None
    try:
        return find_model(name)
    except OServeError:
        return None


def unsized(settings: EngineSettings) -> EngineSettings:
    """The settings without a cache size."""
    return msgspec.structs.replace(settings, kv_cache_memory_bytes=None)


def cache_sized(
    settings: EngineSettings,
    model: str,
    devices: Sequence[Device],
    shape: ReplicaShape,
    free_bytes: float | None = None,
) -> EngineSettings:
    """Settings for an engine without a cache size: on CPU with the size that fits now.

    ``free_bytes``: of the main memory of the devices' machine; ``None``: it is this one.
    """
    if settings.kv_cache_memory_bytes or shape.kv_cache_memory_bytes:
        return settings
    fit = MemoryCheck(
        settings=settings,
        devices=tuple(devices),
        model=known_model(model),
        free_bytes=float(available_memory_bytes()) if free_bytes is None else free_bytes,
    )
    return fit.sized([shape])[0]


def with_settings(room: MemoryCheck, settings: EngineSettings) -> MemoryCheck:
    """The same devices and memory under other settings."""
    return MemoryCheck(
        settings=settings, devices=room.devices, model=room.model, free_bytes=room.free_bytes
    )


def _is_judged(spec: ReplicaSpec) -> bool:
    if not isinstance(spec.backend, VllmBackend):
        return False
    return not any(word.partition("=")[0] in _DECISIVE for word in spec.backend.engine_args)


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
