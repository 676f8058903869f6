"""Digests of a model's files on this machine, so that nodes can be compared.

Small files are read whole. Of large ones, which are weights, the size and samples at even distances
are read: that tells other revisions and broken copies apart, but not every single flipped bit.
"""

import hashlib
import os
from pathlib import Path

from oserve.nodes.examination import ModelFile, ModelFilesFacts

_WHOLE_BYTES = 16 << 20
_SAMPLE_BYTES = 256 << 10
_SAMPLES = 16
_MAX_FILES = 2000
_SUFFIXES = {".json", ".txt", ".model", ".safetensors", ".bin", ".jinja", ".tiktoken", ".gguf"}


def examine_model(name: str, cache: Path | None = None) -> ModelFilesFacts:
    """The files of a model: a folder, or a Hugging Face id that is in the cache of downloads."""
    folder = find_folder(name, cache or _cache())
    if folder is None:
        return ModelFilesFacts(error="its files are not here")
    try:
        files = sorted(item for item in folder.iterdir() if item.suffix in _SUFFIXES)
        found = tuple(digest_of(file) for file in files[:_MAX_FILES] if file.is_file())
    except OSError as error:
        return ModelFilesFacts(error=f"its files cannot be read: {error.strerror}")
    return ModelFilesFacts(files=found, error="" if found else "its folder has no model files")


def find_folder(name: str, cache: Path) -> Path | None:
    """The folder of a model's files; ``None`` if it is not on this machine."""
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    own = cache / f"models--{name.replace('/', '--')}"
    try:
        revision = (own / "refs" / "main").read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    found = own / "snapshots" / revision
    return found if found.is_dir() else None


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


def _cache() -> Path:
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")
