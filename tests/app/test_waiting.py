"""What is said while a command computes."""

import io
import threading

import pytest
from rich.console import Console

from oserve.cli import waiting as module
from oserve.cli.waiting import waiting


class Told(io.StringIO):
    """Notes when something has been written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = threading.Event()

    def write(self, text: str, /) -> int:
        count = super().write(text)
        if text.strip():
            self.written.set()
        return count


def test_a_pipe_is_told_once_what_a_long_wait_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PATIENCE_S", 0.0)
    file = Told()
    with waiting(Console(file=file), "simulating [4] plans") as note:
        assert file.written.wait(60)
        note("7 simulations")
    assert file.getvalue() == "simulating [4] plans …\n"


def test_a_pipe_is_not_told_of_a_short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PATIENCE_S", 3600.0)
    file = Told()
    before = threading.active_count()
    with waiting(Console(file=file), "simulating"):
        pass
    assert file.getvalue() == ""
    # The line that was to come is taken back.
    for thread in threading.enumerate()[before:]:
        thread.join(60)
    assert threading.active_count() <= before


def test_a_terminal_sees_how_far_it_is() -> None:
    file = Told()
    with waiting(Console(file=file, force_terminal=True), "simulating") as note:
        note("7 simulations")
    assert "simulating" in file.getvalue()
