"""Shard maps: which box of which tensor each rank of a replica holds, and where in its parameter.

Ranks of a replica, like its devices, are ordered by stage, then by tensor-parallel rank. Layers go
to stages as vLLM's ``get_pp_indices`` deals them (vllm/distributed/utils.py).
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

from oserve.core import OServeError, Precision, ReplicaSpec
from oserve.perf.model import ModelFacts
from oserve.switch.family import Family, family_of
from oserve.switch.precision import WeightFormat, format_of, parameters_of
from oserve.switch.tensor import Box, Parameter, Range, TensorSpec, Where, volume


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a replica cuts the model. ``expert_parallel``: whole experts on each rank."""

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    held: WeightFormat = field(default_factory=WeightFormat)
    expert_parallel: bool = False

    @property
    def ranks(self) -> int:
        """Number of devices."""
        return self.tensor_parallel_size * self.pipeline_parallel_size


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardPlacement:
    """A replica's layout on devices, in rank order."""

    replica: str
    layout: Layout
    devices: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(set(self.devices)) != self.layout.ranks:
            raise OServeError(
                f"replica {self.replica} has {len(set(self.devices))} devices for "
                f"{self.layout.ranks} ranks",
                place="plan.replicas",
                remedy="give one device per rank",
            )


class Contents(ABC):
    """What replicas hold, by format: parameters, one for each of ``layers`` layers."""

    __slots__ = ()

    @property
    @abstractmethod
    def layers(self) -> int:
        """Number of layers."""

    @abstractmethod
    def parameters(self, held: WeightFormat) -> tuple[Parameter, ...]:
        """Return all parameters in a format."""

    def stages(self, where: Where, stages: int) -> tuple[tuple[int, Range], ...]:
        """Return (stage, layers) of stages that have such a tensor; (0, 1) outside of layers."""
        if where is Where.LAYER:
            return tuple(enumerate(stage_layers(self.layers, stages)))
        chosen = {
            Where.FIRST: (0,),
            Where.LAST: (stages - 1,),
            Where.ENDS: (0,) if stages == 1 else (0, stages - 1),
            Where.EVERY: tuple(range(stages)),
        }[where]
        return tuple((stage, (0, 1)) for stage in chosen)


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture(Contents):
    """The weights of a model whose parameter layout is known."""

    model: ModelFacts
    family: Family

    @property
    def layers(self) -> int:
        """Layers of the model."""
        return self.model.layers

    def parameters(self, held: WeightFormat) -> tuple[Parameter, ...]:
        """Return its parameters in a format."""
        return parameters_of(self.model, self.family, held)


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A box of a tensor (of one layer) and where it starts in the rank's local parameter."""

    tensor: TensorSpec
    box: Box
    start: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Local:
    """A rank's parameter: its local shape and the pieces in it; the rest is padding."""

    parameter: Parameter
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def padded(self) -> bool:
        """Whether some of it is padding of the vocabulary, which is zero."""
        room = volume(tuple((0, size) for size in self.shape))
        return room > sum(volume(piece.box) for piece in self.pieces)


def architecture_of(model: ModelFacts, architecture: str = "") -> Architecture:
    """Return it by config.json's ``architectures`` entry, else by name. Raises OServeError."""
    return Architecture(model=model, family=family_of(model, architecture))


def placed_of(spec: ReplicaSpec, *, plain: Precision = Precision.BF16) -> ShardPlacement:
    """Return the layout of a plan's replica on its devices."""
    layout = Layout(
        tensor_parallel_size=spec.shape.tensor_parallel_size,
        pipeline_parallel_size=spec.shape.pipeline_parallel_size,
        held=format_of(spec.shape.precision, plain=plain),
    )
    return ShardPlacement(replica=spec.id, layout=layout, devices=spec.devices)


@functools.lru_cache(maxsize=256)
def stage_layers(layers: int, stages: int) -> tuple[Range, ...]:
    """Return the layers of each stage; surplus layers go to the later stages but the last."""
    if not 1 <= stages <= layers:
        raise OServeError(
            f"{layers} layers cannot make {stages} pipeline stages",
            place="shape.pipeline_parallel_size",
            remedy="choose a smaller size",
        )
    counts = [layers // stages] * stages
    for back in range(2, layers % stages + 2):
        counts[-back] += 1
    ranges = []
    start = 0
    for count in counts:
        ranges.append((start, start + count))
        start += count
    return tuple(ranges)


def local_parameter(
    parameter: Parameter, rank: int, ranks: int, *, expert_parallel: bool = False
) -> Local:
    """Return what a tensor-parallel rank holds of a parameter (of each layer)."""
    pieces: list[Piece] = []
    shape: list[int] = []
    offset = 0
    for tensor in parameter.parts:
        box, cut_dim, length = tensor.box_of(rank, ranks, expert_parallel=expert_parallel)
        start = [0] * len(box)
        shape = [stop - first for first, stop in box]
        if shape:
            shape[cut_dim] = length
            start[parameter.fuse_dim] = offset
            offset += shape[parameter.fuse_dim]
        pieces.append(Piece(tensor=tensor, box=box, start=tuple(start)))
    if shape:
        shape[parameter.fuse_dim] = offset
    return Local(parameter=parameter, shape=tuple(shape), pieces=tuple(pieces))


def shard_map(architecture: Contents, layout: Layout, rank: int) -> dict[str, Local]:
    """Return what one rank holds, by the engine's parameter names with layer numbers."""
    stage, tensor_rank = divmod(rank, layout.tensor_parallel_size)
    held: dict[str, Local] = {}
    for parameter in architecture.parameters(layout.held):
        local = local_parameter(
            parameter,
            tensor_rank,
            layout.tensor_parallel_size,
            expert_parallel=layout.expert_parallel,
        )
        for own, layers in architecture.stages(parameter.where, layout.pipeline_parallel_size):
            if own == stage:
                for layer in range(*layers):
                    held[parameter.name.replace("{}", str(layer))] = local
    return held


def pieces_by_key(
    architecture: Contents, layout: Layout, rank: int
) -> dict[tuple[str, str, str], tuple[Parameter, Piece]]:
    """Return the rank's pieces in its own stage, by the key of their tensor."""
    stage, tensor_rank = divmod(rank, layout.tensor_parallel_size)
    found = {}
    for parameter in architecture.parameters(layout.held):
        stages = architecture.stages(parameter.where, layout.pipeline_parallel_size)
        if any(own == stage for own, _ in stages):
            local = local_parameter(
                parameter,
                tensor_rank,
                layout.tensor_parallel_size,
                expert_parallel=layout.expert_parallel,
            )
            found.update({piece.tensor.key: (parameter, piece) for piece in local.pieces})
    return found


def place_of(piece: Piece, box: Box) -> tuple[slice, ...]:
    """Return where a box of the tensor lies in the local parameter that holds the piece.

    Raises ValueError if the piece does not hold all of it.
    """
    if any(a < c or d < b for (a, b), (c, d) in zip(box, piece.box, strict=True)):
        raise ValueError(f"{box} of {piece.tensor.name} is not inside {piece.box}")
    return tuple(
        slice(start + a - c, start + b - c)
        for start, (a, b), (c, _) in zip(piece.start, box, piece.box, strict=True)
    )


def differences(
    expected: Mapping[str, Local], live: Mapping[str, tuple[int, ...]]
) -> tuple[str, ...]:
    """Return how an engine's parameters (names and shapes it reports) differ from a shard map.

    Parameters that describe the rank itself (``weight_shape`` of packed weights) or the type of the
    KV cache (scales of attention) never move and are ignored.
    """
    found = [f"{name} is missing" for name in expected if name not in live]
    for name, shape in live.items():
        if name not in expected:
            if not name.endswith("weight_shape") and ".attn." not in name:
                found.append(f"{name} is not known")
        elif tuple(shape) != expected[name].shape:
            found.append(f"{name} is {tuple(shape)}, not {expected[name].shape}")
    return tuple(found)
