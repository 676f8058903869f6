"""The size of a model's weights by the safetensors files beside its ``config.json``."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_MOST_HEADER_BYTES = 100_000_000
# Floats become the engine's type, unless they are scales; other types stay as they are.
_WIDE = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
_SCALES = ("scale", "scale_inv", "scales", "absmax", "zero_point")
_ENGINE_BYTES = 2
# vLLM loads layers for multi-token prediction only to decode speculatively.
_DRAFT = re.compile(r"(^|\.)(mtp|nextn_predict_layers)(\.|$)")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def weight_file_bytes(folder: Path, layers: int, *, wide: bool = False) -> int:
    """Bytes of the weights of a folder as a 16-bit engine holds them; 0 if that is not known.

    By the headers of all files, or else the index's total, which says nothing of types: ``wide``
    files hold 32-bit floats. Layers from ``layers`` on are left out, as vLLM does without
    speculative decoding.
    """
    index = _index(folder / INDEX)
    names = index.get("weight_map") if index else None
    files = set(names.values()) if isinstance(names, Mapping) else {_SINGLE}
    headers = [_header(folder / str(file)) for file in sorted(files, key=str)]
    if all(header is not None for header in headers):
        whole: dict[str, Any] = {}
        for header in headers:
            whole |= header or {}
        return sum(_held(name, entry) for name, entry in whole.items() if not _beyond(name, layers))
    total = _total(index)
    if not isinstance(names, Mapping) or any(_beyond(str(name), layers) for name in names):
        return 0
    return total // 2 if wide else total


def _index(file: Path) -> Mapping[str, Any] | None:
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _total(index: Mapping[str, Any] | None) -> int:
    metadata = index.get("metadata") if index else None
    total = metadata.get("total_size") if isinstance(metadata, Mapping) else None
    return int(total) if isinstance(total, int | float) and 0 < total < math.inf else 0


def _header(file: Path) -> Mapping[str, Any] | None:
    """The entries of a file by tensor; ``None`` if it is missing or no such file."""
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if length > min(size, _MOST_HEADER_BYTES):
                return None
            found = json.loads(opened.read(length))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    found.pop("__metadata__", None)
    whole = 8 + length + max((end for _, end in _offsets(found)), default=0)
    # A file that is still being downloaded says nothing of the whole.
    return found if whole <= size else None


def _offsets(entries: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    for entry in entries.values():
        offsets = entry.get("data_offsets") if isinstance(entry, Mapping) else None
        if isinstance(offsets, list) and [type(one) for one in offsets] == [int, int]:
            yield offsets[0], offsets[1]


def _held(name: str, entry: Any) -> int:
    """Bytes of one tensor in the engine."""
    first, last = next(_offsets({name: entry}), (0, 0))
    width = _WIDE.get(str(entry.get("dtype"))) if isinstance(entry, Mapping) else None
    if width is None or name.endswith(_SCALES):
        return last - first
    return (last - first) // width * _ENGINE_BYTES


def _beyond(name: str, layers: int) -> bool:
    if _DRAFT.search(name):
        return True
    layer = _LAYER.search(name)
    # Towers of images or sound have layers of their own.
    own = re.search(r"vis|vit|audio|encoder", name)
    return layer is not None and own is None and int(layer[1]) >= layers
