"""Safetensors files, read and written one tensor at a time: bf16 and fp32 floats, int8 integers.

NumPy has no bf16, which the usual library needs torch for: here its bits are rounded from fp32 (to
nearest even) and widened again.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oserve.core import OServeError

FloatArray = NDArray[np.float32]
AnyArray = NDArray[Any]

_SIZES = {"BF16": 2, "F32": 4, "I8": 1}
_MOST_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointTensor:
    """One tensor of a file; ``make`` reads or computes its values, fp32 or int8.

    ``kind`` is its type in the file: ``BF16``, ``F32`` or ``I8``.
    """

    kind: str
    shape: tuple[int, ...]
    make: Callable[[], AnyArray]

    @property
    def byte_count(self) -> int:
        """Its size in the file."""
        count = _SIZES[self.kind]
        for size in self.shape:
            count *= size
        return count


def tensor(values: AnyArray, *, kind: str = "") -> CheckpointTensor:
    """A tensor of these values; without a ``kind`` floats are stored as bf16."""
    kind = kind or ("I8" if values.dtype == np.int8 else "BF16")
    return CheckpointTensor(kind=kind, shape=values.shape, make=lambda: values)


def write_tensors(path: Path, tensors: Mapping[str, CheckpointTensor]) -> None:
    """Write tensors in this order, with the values of one at a time in memory.

    Raises ``OServeError`` if values do not have their tensor's shape, ``OSError`` if the file
    cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, item in tensors.items():
        start, end = end, end + item.byte_count
        header[name] = {"dtype": item.kind, "shape": item.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, item in tensors.items():
            values = item.make()
            if values.shape != item.shape:
                raise OServeError(
                    f"{name} has the shape {values.shape}, not {item.shape}",
                    place=str(path),
                    remedy="get the model again",
                )
            file.write(_stored(values, item.kind).tobytes())


def read_tensors(path: Path) -> dict[str, CheckpointTensor]:
    """The tensors of a file. Raises ``OServeError`` for other types, or a truncated file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(size, _MOST_HEADER_BYTES):
                raise ValueError("it has no header")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        return {name: _read(path, 8 + length, entry, size) for name, entry in header.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise OServeError(
            f"not a safetensors file of bf16, fp32 and int8: {error}",
            place=str(path),
            remedy="get the model again",
        ) from None


def parameter_count(tensors: Iterable[CheckpointTensor]) -> int:
    """The number of values in all of them."""
    return sum(item.byte_count // _SIZES[item.kind] for item in tensors)


def _read(path: Path, data: int, entry: Mapping[str, Any], size: int) -> CheckpointTensor:
    kind, shape = entry["dtype"], tuple(entry["shape"])
    first, last = entry["data_offsets"]
    made = CheckpointTensor(
        kind=kind, shape=shape, make=lambda: _values(path, data + first, kind, shape)
    )
    if made.byte_count != last - first or data + last > size:
        raise ValueError("it is truncated")
    return made


def _values(path: Path, offset: int, kind: str, shape: tuple[int, ...]) -> AnyArray:
    count = int(np.prod(shape))
    types = {"BF16": "<u2", "F32": "<f4", "I8": "i1"}
    words = np.fromfile(path, dtype=types[kind], count=count, offset=offset)
    if kind == "BF16":
        words = (words.astype(np.uint32) << 16).view(np.float32)
    return words.reshape(shape)


def _stored(values: AnyArray, kind: str) -> AnyArray:
    if kind != "BF16":
        return values.astype({"F32": "<f4", "I8": "i1"}[kind], copy=False)
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
