"""The logs engines leave: one file per replica, and the one line that says why it ended."""

import contextlib
import re
from pathlib import Path

_TAIL_BYTES = 128 * 1024
_MAX_REASON_CHARS = 300
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
# "(EngineCore pid=7) ERROR 01-31 12:00:00 [core.py:11] ValueError: ..." -> "ValueError: ..."
_PREFIX = re.compile(
    r"^(\([^)]*pid=\d+\)\s*)?((DEBUG|INFO|WARNING|ERROR)\s+\S+\s+\S+\s+\[[^\]]*\]\s*)?"
)
_ERROR = re.compile(r"^[\w.]*(Error|Exception|Interrupt)\b.*:|^error:|: error: ")
# What vLLM says after the fact, far below the line that tells the cause.
_AFTERMATH = ("Engine core initialization failed", "EngineDeadError", "Engine process failed")


def open_log(folder: Path, name: str) -> Path:
    """Path of a fresh log; the one before is kept as ``NAME.log.1``, older ones are not."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / f"{name}.log"
    with contextlib.suppress(FileNotFoundError):
        path.replace(folder / f"{name}.log.1")
    return path


def telling_line(path: Path) -> str:
    """The last line that names an error, else the last line; empty when there is no log."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    lines = [_PREFIX.sub("", _COLOURS.sub("", line)).strip() for line in text.splitlines()]
    lines = [line for line in lines if line]
    errors = [line for line in lines if _ERROR.search(line)]
    causes = [line for line in errors if not any(words in line for words in _AFTERMATH)]
    for found in (causes, errors, lines):
        if found:
            return found[-1][:_MAX_REASON_CHARS]
    return ""
