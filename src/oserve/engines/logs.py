"""The logs of engines: one file per replica, and the line that tells why an engine ended."""

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
# Lines that are no cause; and errors that vLLM logs later, far below the cause.
_NOISE = ("warnings.warn(", "resource_tracker:")
_AFTERMATH = ("Engine core initialization failed", "EngineDeadError", "Engine process failed")


def rotate_log(path: Path) -> None:
    """Make room for a new log: the previous one becomes ``NAME.log.1``, an older one is removed.

    Raises ``OSError`` if the folder cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with contextlib.suppress(FileNotFoundError):
        path.replace(path.with_name(f"{path.name}.1"))


def telling_line(path: Path) -> str:
    """The last line that names an error, else the last line; empty without a log."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    lines = [_PREFIX.sub("", _COLOURS.sub("", line)).strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not any(words in line for words in _NOISE)]
    errors = [i for i, line in enumerate(lines) if _ERROR.search(line)]
    causes = [i for i in errors if not any(words in lines[i] for words in _AFTERMATH)]
    if not lines:
        return ""
    found = (causes or errors or [len(lines) - 1])[-1]
    # Validation errors tell their cause on the lines that follow.
    last = found + 3 if "validation error" in lines[found] else found + 1
    return " ".join(lines[found:last])[:_MAX_REASON_CHARS]
