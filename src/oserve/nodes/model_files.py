"""The files of a model on this machine: where they lie, and digests to compare nodes by.

Small files are read whole. Of large ones, which are weights, the size and samples at even distances
are read: that tells other revisions and broken copies apart, but not every single flipped bit.
"""

import hashlib
import os
import re
from collections.abc import Collection
from pathlib import Path

import msgspec

from oserve.nodes.examination import FILE_NAMES, MAX_FILES, ModelFile, ModelFilesFacts
from oserve.nodes.fetch_messages import ModelHoldings

_WHOLE_BYTES = 16 << 20
_SAMPLE_BYTES = 256 << 10
_SAMPLES = 16
_WEIGHTS = {".safetensors", ".bin", ".gguf"}
_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".py"} | _WEIGHTS
_NAMES = re.compile(FILE_NAMES)
_INDEX = ".index.json"
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_HUB_NAMES = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")


def examine_model(name: str, cache: Path | None = None) -> ModelFilesFacts:
    """The files of a model: a folder, or a Hugging Face id that is in the cache of downloads."""
    holdings = find_holdings(name, cache)
    return ModelFilesFacts(files=holdings.files, error=holdings.error)


def find_holdings(name: str, cache: Path | None = None) -> ModelHoldings:
    """The files of a model, and whether an engine can start from them."""
    folder = find_folder(name, cache or cache_folder())
    if folder is None:
        return ModelHoldings(error="its files are not here")
    try:
        files = sorted(item for item in folder.iterdir() if is_model_file(item))
        found = tuple(digest_of(file) for file in files[:MAX_FILES])
    except OSError as error:
        return ModelHoldings(error=f"its files cannot be read: {error.strerror}")
    return ModelHoldings(
        files=found,
        complete=is_complete(folder, {file.name for file in found}),
        revision=folder.name if is_hub_name(name) and not Path(name).is_dir() else "",
        error="" if found else "its folder has no model files",
    )


def is_model_file(item: Path) -> bool:
    """Whether an engine may need it."""
    fits = item.suffix in _SUFFIXES and _NAMES.fullmatch(item.name) is not None
    return fits and item.is_file()


def is_complete(folder: Path, names: Collection[str]) -> bool:
    """Whether there is a configuration, weights, and each part of weights that an index lists."""
    if "config.json" not in names or not any(Path(name).suffix in _WEIGHTS for name in names):
        return False
    for name in names:
        if name.endswith(_INDEX):
            try:
                index = _WEIGHTS_INDEX_DECODER.decode((folder / name).read_bytes())
            except (OSError, msgspec.DecodeError):
                return False
            if not set(index.weight_map.values()) <= set(names):
                return False
    return True


class _WeightsIndex(msgspec.Struct):
    """The file that tells in which part of the weights each tensor is."""

    weight_map: dict[str, str]


_WEIGHTS_INDEX_DECODER = msgspec.json.Decoder(_WeightsIndex)


def find_folder(name: str, cache: Path) -> Path | None:
    """The folder of a model's files; ``None`` if it is not on this machine."""
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    try:
        revision = (_own_cache(name, cache) / "refs" / "main").read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    found = _own_cache(name, cache) / "snapshots" / revision
    return found if _REVISION.fullmatch(revision) and found.is_dir() else None


def place_for(name: str, revision: str, cache: Path) -> Path | None:
    """The folder where the files of a model belong; ``None`` if that is not known.

    A path must be absolute, since a relative one is another folder on each node.
    """
    if Path(name).expanduser().is_absolute():
        return Path(name).expanduser()
    if is_hub_name(name) and _REVISION.fullmatch(revision):
        return _own_cache(name, cache) / "snapshots" / revision
    return None


def note_revision(name: str, revision: str, cache: Path) -> None:
    """Make a revision that is in the cache the one in use. Raises OSError."""
    main = _own_cache(name, cache) / "refs" / "main"
    main.parent.mkdir(parents=True, exist_ok=True)
    fresh = main.with_name("main.oserve-new")
    fresh.write_text(revision, encoding="ascii")
    os.replace(fresh, main)


def is_hub_name(name: str) -> bool:
    """Whether a name has the form of a Hugging Face id."""
    return _HUB_NAMES.fullmatch(name) is not None


def _own_cache(name: str, cache: Path) -> Path:
    return cache / f"models--{name.replace('/', '--')}"


def digest_of(file: Path) -> ModelFile:
    """See the module. Raises OSError."""
    size = file.stat().st_size
    digest = hashlib.blake2b(str(size).encode() + b"\n", digest_size=16)
    sampled = size > _WHOLE_BYTES
    with file.open("rb") as source:
        if sampled:
            for index in range(_SAMPLES):
                source.seek((size - _SAMPLE_BYTES) * index // (_SAMPLES - 1))
                digest.update(source.read(_SAMPLE_BYTES))
        else:
            digest.update(source.read())
    return ModelFile(name=file.name, size_bytes=size, digest=digest.hexdigest(), sampled=sampled)


def cache_folder() -> Path:
    """The cache of downloads from Hugging Face."""
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")
