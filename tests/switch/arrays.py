"""Models of numpy arrays: whole tensors, their shards, and transfer plans carried out on them."""

import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from oserve.perf.model import ModelFacts
from oserve.switch.choice import Copy
from oserve.switch.layout import (
    Architecture,
    Layout,
    Piece,
    ShardPlacement,
    architecture_of,
    pieces_by_key,
    place_of,
    shard_map,
)
from oserve.switch.precision import WeightFormat
from oserve.switch.tensor import Parameter, TensorSpec, Where
from oserve.switch.transfer import TransferPlan

Array = NDArray[np.float64]
Wholes = dict[tuple[tuple[str, str, str], int], Array]
# Local parameters by device and name.
Memory = dict[tuple[str, str], Array]
# Not a number that any tensor holds: what was never written shows.
UNSET = -1.0


def tiny(name: str, **changes: object) -> Architecture:
    """A model of that family that 1, 2, 4 and 8 ranks can share, int4 in groups of 8."""
    sizes: dict[str, object] = {
        "layers": 5,
        "hidden": 64,
        "heads": 8,
        "kv_heads": 2,
        "head_dim": 8,
        "intermediate": 64,
        "vocab": 100,
        "gated": not name.startswith("opt"),
        "tied": name in {"opt", "qwen3"},
        "max_model_len": 6,
    }
    if "moe" in name or name.startswith("mixtral"):
        sizes |= {"experts": 8, "experts_per_token": 2, "intermediate": 64}
    return architecture_of(ModelFacts(name=name, **(sizes | changes)))  # type: ignore[arg-type]


def wholes(architecture: Architecture, held: WeightFormat) -> Wholes:
    """Each tensor of each layer, every value another number."""
    made: Wholes = {}
    start = 0
    for parameter in architecture.parameters(held):
        for tensor in parameter.parts:
            for layer in range(layer_count(architecture, tensor)):
                size = int(np.prod(tensor.shape))
                values = np.arange(start, start + size, dtype=np.float64)
                made[tensor.key, layer] = values.reshape(tensor.shape)
                start += size
    return made


def layer_count(architecture: Architecture, tensor: TensorSpec) -> int:
    return architecture.model.layers if tensor.where is Where.LAYER else 1


def empty(architecture: Architecture, placed: ShardPlacement) -> Memory:
    """The replica's parameters as they are before anything came."""
    return {key: array.copy() for key, array in _unset(architecture, placed).items()}


@functools.lru_cache(maxsize=512)
def _unset(architecture: Architecture, placed: ShardPlacement) -> Memory:
    return loaded(architecture, placed, None)


def loaded(architecture: Architecture, placed: ShardPlacement, whole: Wholes | None) -> Memory:
    """The replica's parameters, filled from whole tensors; unset with None, padding zero."""
    memory: Memory = {}
    for rank, device in enumerate(placed.devices):
        for name, local in shard_map(architecture, placed.layout, rank).items():
            array = np.zeros(local.shape)
            layer = next((int(word) for word in name.split(".") if word.isdigit()), 0)
            for piece in local.pieces:
                where = place_of(piece, piece.box)
                if whole is None:
                    array[where] = UNSET
                else:
                    box = tuple(slice(*edge) for edge in piece.box)
                    array[where] = whole[piece.tensor.key, layer][box]
            memory[device, name] = array
    return memory


def carried_out(
    architecture: Architecture,
    plan: TransferPlan,
    sources: Sequence[ShardPlacement],
    targets: Sequence[ShardPlacement],
    held: Memory,
) -> Memory:
    """The targets' parameters after all copies; a byte written twice is an error."""
    memory: Memory = {}
    for target in targets:
        memory.update(empty(architecture, target))
    homes = _homes(architecture, sources), _homes(architecture, targets)
    for copy in (*plan.copies, *plan.kept):
        for layer in range(*copy.item.layers):
            value = _part(held, homes[0], copy, copy.source, layer)
            place = _part(memory, homes[1], copy, copy.target, layer)
            assert not np.count_nonzero(place != UNSET), "written twice"
            place[...] = value
    assert all((array != UNSET).all() for array in memory.values()), "left out"
    return memory


Home = dict[tuple[str, str, str], tuple[Parameter, Piece]]


def _homes(architecture: Architecture, placed: Sequence[ShardPlacement]) -> dict[str, Home]:
    return {
        device: home(architecture, one.layout, rank)
        for one in placed
        for rank, device in enumerate(one.devices)
    }


@functools.lru_cache(maxsize=4096)
def home(architecture: Architecture, layout: Layout, rank: int) -> Home:
    return pieces_by_key(architecture, layout, rank)


def _part(
    memory: Memory,
    homes: dict[str, Home],
    copy: Copy,
    device: str,
    layer: int,
) -> Array:
    parameter, piece = homes[device][copy.item.tensor.key]
    name = parameter.name.replace("{}", str(layer))
    return memory[device, name][place_of(piece, copy.item.box)]
