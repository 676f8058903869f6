"""The room ``app`` only wires the parts of a server."""

from pathlib import Path

import oserve.app

MOST_LINES = 1000


def test_app_stays_small() -> None:
    folder = Path(oserve.app.__file__).parent
    files = folder.rglob("*.py")
    assert sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files) < MOST_LINES
