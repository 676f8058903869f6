"""Why an engine ended, from its log."""

from pathlib import Path

import pytest

from oserve.engines.logs import rotate_log, telling_line

FAILED_START = """(APIServer pid=1) INFO 11-21 03:34:40 [api_utils.py:286] non-default args
(EngineCore pid=2) ERROR 11-21 03:34:41 [core.py:11] Traceback (most recent call last):
(EngineCore pid=2) ERROR 11-21 03:34:41 [core.py:11] ValueError: no room for KV cache
(APIServer pid=1) Traceback (most recent call last):
(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above.
"""
VALIDATION = """pydantic_core.ValidationError: 1 validation error for ModelConfig
  Value error, too long
  For further information visit
"""


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (FAILED_START, "ValueError: no room for KV cache"),
        (VALIDATION, "Value error, too long"),
        ("api_server.py: error: unrecognized arguments: --x\n", "unrecognized arguments"),
        ("\x1b[31mone\x1b[0m\ntwo\n\n", "two"),
        ("", ""),
    ],
)
def test_the_telling_line(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "log"
    path.write_text(text)
    found = telling_line(path)
    assert reason in found
    assert bool(reason) == bool(found)


def test_no_log_says_nothing(tmp_path: Path) -> None:
    assert telling_line(tmp_path / "none") == ""


def test_one_log_before_is_kept(tmp_path: Path) -> None:
    for number in range(3):
        path = tmp_path / "logs" / "r.log"
        rotate_log(path)
        path.write_text(str(number))
    assert (tmp_path / "logs" / "r.log").read_text() == "2"
    assert (tmp_path / "logs" / "r.log.1").read_text() == "1"
    assert len(list((tmp_path / "logs").iterdir())) == 2
