"""What a wait is for, on standard error: a spinner on a terminal, or else one line."""

import contextlib
import threading
from collections.abc import Callable, Iterator

from rich.console import Console

# A file or pipe is told only of waits that are worth a line.
_PATIENCE_S = 1.0


@contextlib.contextmanager
def waiting(console: Console, words: str) -> Iterator[Callable[[str], None]]:
    """Say what is being done while the block runs.

    Yields a function that adds a note, such as how much is done; only a terminal shows notes.
    """
    if console.is_terminal:
        with console.status(words) as status:
            yield lambda note: status.update(f"{words}: {note}")
        return
    line = threading.Timer(_PATIENCE_S, console.print, [f"{words} …"], {"markup": False})
    line.daemon = True
    line.start()
    try:
        yield lambda _note: None
    finally:
        line.cancel()
