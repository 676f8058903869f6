"""Model folders, which appear complete or not at all."""

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

WEIGHTS = "model.safetensors"
CONFIG = "config.json"


def once(path: Path, write: Callable[[Path], None]) -> Path:
    """Fill a temporary folder and rename it, so that no process finds a half-written model.

    A folder with a ``config.json`` is left as it is: ``write`` must write that file last. Raises
    ``OSError`` if the folder cannot be written.
    """
    if (path / CONFIG).exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        write(folder)
        folder.chmod(0o755)
        try:
            folder.rename(path)
        except OSError:
            # Another process was faster; its files are the same.
            if not (path / CONFIG).exists():
                raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return path


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write JSON with one field per line."""
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_others(source: Path, target: Path) -> None:
    """Copy all files of a model folder but its weights and configuration."""
    for extra in source.iterdir():
        if extra.is_file() and extra.name not in {WEIGHTS, CONFIG}:
            shutil.copy(extra, target / extra.name)
