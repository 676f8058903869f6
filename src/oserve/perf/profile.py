"""Profiles: measurements of one model on one kind of device, and the step model fitted to them.

An entry per (TP, PP, precision) has the measured steps, the roofline's coefficients fitted to them,
and the engine's KV capacity. They hold for one machine and model: bandwidth may be an overhead's.
"""

import functools
import math
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Annotated

import msgspec

from oserve.core import OServeError, Precision, ReplicaShape
from oserve.core.json_keys import refuse_duplicate_keys
from oserve.perf.costs import measured_costs
from oserve.perf.device import Link, find_device
from oserve.perf.memory import cache_of_tokens, memory_fit
from oserve.perf.model import ModelFacts
from oserve.perf.power import ReplicaWork, replica_power_w
from oserve.perf.roofline import (
    Coefficients,
    Roofline,
    StepModel,
    coefficients_from,
    hops_between_nodes,
)
from oserve.perf.sequence_cache import SequenceCache

FORMAT = 1
# (tensor parallel size, pipeline parallel size, precision)
ProfileKey = tuple[int, int, Precision]

# A fit with a larger error on its own steps gives a caveat.
_POOR_FIT_PERCENT = 15.0
_SHARES = ("gemm", "memory", "kv", "attention", "all_reduce")

_Count = Annotated[int, msgspec.Meta(ge=1)]
_Natural = Annotated[int, msgspec.Meta(ge=0)]
_Amount = Annotated[float, msgspec.Meta(ge=0)]
_Positive = Annotated[float, msgspec.Meta(gt=0)]


class ProfileStep(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """One measured step; the first four fields are the arguments of ``StepModel.step_s``."""

    prefill_tokens: _Amount
    attended_tokens: _Amount
    decode_seqs: _Amount
    kv_tokens: _Amount
    seconds: _Positive


class ProfileEntry(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The measurements of one shape.

    ``kv_tokens``: the replica's KV cache with ``kv_cache_memory_bytes`` per device, which is
    ``None`` if the engine chose the size. ``error_percent``: mean absolute error of the fitted
    model on ``steps``.
    """

    tensor_parallel_size: _Count
    pipeline_parallel_size: _Count
    precision: Precision
    max_num_batched_tokens: _Count
    max_num_seqs: _Count
    max_model_len: _Natural
    kv_cache_memory_bytes: _Count | None
    kv_tokens: _Count
    coefficients: dict[str, float]
    error_percent: _Amount
    steps: tuple[ProfileStep, ...]

    @property
    def key(self) -> ProfileKey:
        """The key, unique among the entries."""
        return (self.tensor_parallel_size, self.pipeline_parallel_size, self.precision)


class Profile(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """A profile. ``machine`` names the processor or GPU; ``cores_per_device`` is 0 for GPUs."""

    format: int = FORMAT
    model: ModelFacts
    device_kind: str
    machine: str
    cores_per_device: _Natural
    engine: str
    entries: tuple[ProfileEntry, ...]


class _Version(msgspec.Struct):
    format: int


_PROFILE_DECODER, _VERSION_DECODER = msgspec.json.Decoder(Profile), msgspec.json.Decoder(_Version)


def read_profile(path: Path) -> Profile:
    """Read a profile; raises OServeError that names file and field."""
    try:
        content = path.read_bytes()
    except OSError as error:
        reason, remedy = error.strerror, "check the path, or measure: oserve profile MODEL"
        raise OServeError(f"cannot read it: {reason}", place=str(path), remedy=remedy) from None
    return decode_profile(content, place=str(path))


def decode_profile(content: bytes, *, place: str) -> Profile:
    """Decode a profile; ``place`` names the source in errors. See ``read_profile``."""
    remedy = "measure again: oserve profile MODEL"
    try:
        version = _VERSION_DECODER.decode(content).format
    except (msgspec.DecodeError, RecursionError) as error:
        raise _bad(error, place, remedy) from None
    if version != FORMAT:
        raise OServeError(
            f"its format is {version}, not {FORMAT}", place=f"{place}: format", remedy=remedy
        )
    try:
        profile = _PROFILE_DECODER.decode(content)
    except (msgspec.DecodeError, RecursionError) as error:
        raise _bad(error, place, remedy) from None
    refuse_duplicate_keys(content.decode(), place=place)
    seen: set[ProfileKey] = set()
    for index, entry in enumerate(profile.entries):
        where = f"{place}: entries[{index}]"
        if entry.key in seen:
            name = key_name(entry.key)
            raise OServeError(f"a second entry of {name}", place=where, remedy=remedy)
        seen.add(entry.key)
        _check_coefficients(entry.coefficients, f"{where}.coefficients", remedy)
    return profile


def write_profile(path: Path, profile: Profile) -> None:
    """Write the file atomically; raises OServeError if it cannot be written."""
    content = msgspec.json.format(msgspec.json.encode(profile), indent=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, made = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content + b"\n")
            os.chmod(made, 0o644)
            os.replace(made, path)
        except OSError:
            os.unlink(made)
            raise
    except OSError as error:
        raise OServeError(
            f"cannot write it: {error.strerror}", place=str(path), remedy="choose another --output"
        ) from None


def merged(old: Profile, new: Profile) -> Profile:
    """``new`` with the entries of ``old`` that it did not measure again.

    Drops ``old`` if it is of another model, machine or engine.
    """
    if msgspec.structs.replace(old, entries=()) != msgspec.structs.replace(new, entries=()):
        return new
    again = {entry.key for entry in new.entries}
    kept = tuple(entry for entry in old.entries if entry.key not in again)
    return msgspec.structs.replace(new, entries=kept + new.entries)


def key_name(key: ProfileKey) -> str:
    """The key as ``oserve profile --shape`` takes it, such as ``tp2pp1-fp32``."""
    return f"tp{key[0]}pp{key[1]}-{key[2]}"


def shape_key(shape: ReplicaShape) -> ProfileKey:
    """The key of the profile entry for a shape."""
    return (shape.tensor_parallel_size, shape.pipeline_parallel_size, shape.precision)


class ProfileSource:
    """Step times, KV capacity and power of the shapes in a profile, and of no others.

    ``name`` is the profile's path or name. ``cache_bytes`` is the KV cache per device for shapes
    that set no size; 0: the size during the measurement. What was measured on one node holds for
    replicas over several, but for the time that ``network`` takes between stages;
    ``node_devices``: in one node (``None``: all).
    """

    def __init__(
        self,
        profile: Profile,
        *,
        name: str,
        cache_bytes: int = 0,
        node_devices: int | None = None,
        network: Link | None = None,
    ) -> None:
        self._profile = profile
        self._cache_bytes = cache_bytes
        self._node_devices = node_devices
        self._network = network
        self._name = name
        self._entries = {entry.key: entry for entry in profile.entries}
        self._made: dict[ProfileKey, StepModel] = {}

    @property
    def model(self) -> ModelFacts:
        return self._profile.model

    @property
    def profile(self) -> Profile:
        return self._profile

    def sized(self, cache_bytes: int) -> "ProfileSource":
        """The same source for engines with that KV cache per device."""
        return ProfileSource(
            self._profile,
            name=self._name,
            cache_bytes=cache_bytes,
            node_devices=self._node_devices,
            network=self._network,
        )

    @property
    def origin(self) -> str:
        profile = self._profile
        cores = profile.cores_per_device
        each = f", {cores} core{'s' * (cores != 1)} a slot" if cores else ""
        return f"profile {self._name}: measured on {profile.machine}{each}, {profile.engine}"

    def caveats(self, shapes: Sequence[ReplicaShape]) -> tuple[str, ...]:
        """See ``PerformanceSource``."""
        said = []
        for shape in shapes:
            entry = self._entry(shape)
            if entry is None:
                said.append(f"{key_name(shape_key(shape))} was not measured")
                continue
            name = key_name(entry.key)
            if entry.pipeline_parallel_size > 1:
                said.append(f"{name}: prompts among decoding pipelines were not measured")
            if entry.error_percent > _POOR_FIT_PERCENT:
                said.append(f"{name}: measured steps are off by {entry.error_percent:.0f} % of it")
            if shape.max_num_seqs > entry.max_num_seqs:
                said.append(f"{name}: measured with {entry.max_num_seqs} sequences at most")
        return tuple(dict.fromkeys(said))

    def keys(self) -> tuple[ProfileKey, ...]:
        """The measured keys: (tensor parallel size, pipeline parallel size, precision)."""
        return tuple(self._entries)

    def shapes(
        self,
        *,
        max_num_batched_tokens: Sequence[int],
        max_num_seqs: Sequence[int],
        kv_cache_memory_bytes: int | None = None,
    ) -> tuple[ReplicaShape, ...]:
        """Every measured combination with each of these limits."""
        return tuple(
            ReplicaShape(
                tensor_parallel_size=tp,
                pipeline_parallel_size=pp,
                precision=precision,
                max_num_batched_tokens=chunk,
                max_num_seqs=seqs,
                kv_cache_memory_bytes=kv_cache_memory_bytes,
                device_kind=self._profile.device_kind,
            )
            for (tp, pp, precision), chunk, seqs in product(
                self._entries, max_num_batched_tokens, max_num_seqs
            )
        )

    def step_model(self, shape: ReplicaShape) -> StepModel:
        """See ``PerformanceSource``; raises OServeError for a shape that was not measured."""
        entry = self._entry(shape)
        if entry is None:
            known = ", ".join(key_name(key) for key in self._entries) or "nothing"
            raise OServeError(
                f"{key_name(shape_key(shape))} on {shape.device_kind} was not measured; {known} "
                f"on {self._profile.device_kind} was",
                place=self._name,
                remedy=f"measure it: oserve profile --shape {key_name(shape_key(shape))}",
            )
        if entry.key not in self._made:
            make = step_model_maker(
                self._profile.model,
                self._profile.device_kind,
                entry.key,
                network=self._network,
                node_hops=hops_between_nodes(shape, self._node_devices),
            )
            self._made[entry.key] = make(coefficients_from(entry.coefficients))
        return self._made[entry.key]

    def kv_tokens(self, shape: ReplicaShape) -> int:
        """As the engine reported, scaled to the shape's cache size; 0 if not measured."""
        entry = self._entry(shape)
        if entry is None:
            return 0
        wanted = shape.kv_cache_memory_bytes or self._cache_bytes
        if not wanted or wanted == entry.kv_cache_memory_bytes:
            return entry.kv_tokens
        if entry.kv_cache_memory_bytes is None:
            device = find_device(self._profile.device_kind)
            fit = memory_fit(self._profile.model, shape, device.memory_bytes)
            return int(wanted / fit.kv_bytes_per_token)
        return entry.kv_tokens * wanted // entry.kv_cache_memory_bytes

    def sequence_cache(self, shape: ReplicaShape) -> SequenceCache | None:
        """That of the measured number of tokens, which vLLM states for its longest request."""
        longest = getattr(self._entry(shape), "max_model_len", 0)
        return cache_of_tokens(self._profile.model, shape, self.kv_tokens(shape), longest)

    def power_w(self, shape: ReplicaShape, work: ReplicaWork, seconds: float) -> float:
        power = find_device(self._profile.device_kind).power
        costs = measured_costs(self.step_model(shape), shape)
        return replica_power_w(power, costs, shape, work, seconds)

    def _entry(self, shape: ReplicaShape) -> ProfileEntry | None:
        if shape.device_kind not in {self._profile.device_kind, "any"}:
            return None
        return self._entries.get(shape_key(shape))


def shipped_profile(model: ModelFacts, device_kind: str) -> tuple[str, Profile] | None:
    """Name and content of the shipped profile of a model of these sizes, whatever its name."""
    for name, profile in _shipped().items():
        if profile.device_kind == device_kind and _sizes(profile.model) == _sizes(model):
            return name, profile
    return None


def _check_coefficients(values: Mapping[str, float], place: str, remedy: str) -> None:
    """Refuse unknown names and values that give no valid time."""
    plain = Coefficients().as_dict()
    for name, value in values.items():
        if name not in plain:
            raise OServeError(
                f"no coefficient is called {name!r}", place=f"{place}.{name}", remedy=remedy
            )
        least = sys.float_info.min if name in _SHARES else 0.0
        if not least <= value < math.inf:
            raise OServeError(f"{value} is no value", place=f"{place}.{name}", remedy=remedy)
    for name, default in plain.items():
        # The defaults belong to another device, so only coefficients that are 0 may be missing.
        if default and name not in values:
            raise OServeError(f"{name} is missing", place=place, remedy=remedy)


def _bad(error: Exception, place: str, remedy: str) -> OServeError:
    text, _, path = str(error).partition(" - at `$")
    field = path.rstrip("`").lstrip(".")
    return OServeError(text, place=f"{place}: {field}" if field else place, remedy=remedy)


@functools.cache
def _shipped() -> Mapping[str, Profile]:
    folder = resources.files("oserve.perf").joinpath("data")
    return {
        file.name.removesuffix(".json"): decode_profile(file.read_bytes(), place=file.name)
        for file in sorted(folder.iterdir(), key=lambda item: item.name)
        if file.name.endswith(".json")
    }


def _sizes(model: ModelFacts) -> ModelFacts:
    return replace(model, name="", max_model_len=0)


def step_model_maker(
    model: ModelFacts,
    device_kind: str,
    key: ProfileKey,
    *,
    network: Link | None = None,
    node_hops: int = 0,
) -> Callable[[Coefficients], StepModel]:
    """A function from coefficients to the step model of one entry's shapes.

    ``node_hops``: how often a step crosses the ``network`` between nodes.
    """
    device = find_device(device_kind)
    return lambda fit: Roofline(
        model,
        device,
        fit,
        tensor_parallel_size=key[0],
        pipeline_parallel_size=key[1],
        precision=key[2],
        stage_link=network,
        node_hops=node_hops,
    )
