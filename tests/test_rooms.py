"""The picture of the rooms shows the rooms of the import contract."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_picture_shows_the_rooms_of_the_contract() -> None:
    tool = ROOT / "tools" / "rooms.py"
    command = [sys.executable, str(tool), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
