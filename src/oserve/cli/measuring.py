"""The progress of measurements on standard error."""

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from oserve.profiler.profile import ProfileReporter


@contextlib.contextmanager
def reporting(console: Console) -> Iterator[ProfileReporter]:
    """A reporter that shows a progress bar per shape, and lines between them."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:

        def begin(name: str, steps: int) -> None:
            progress.add_task(f"measuring {name}", total=steps)

        def advance(steps: int) -> None:
            progress.advance(progress.task_ids[-1], steps)

        yield ProfileReporter(line=console.print, begin=begin, advance=advance)
