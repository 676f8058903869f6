"""The configuration reference tells every setting, with its default."""

from pathlib import Path

import msgspec
import pytest

from oserve.config import load_plan, setting_paths
from oserve.core import Device
from oserve.plan import check_plan

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("path", setting_paths())
def test_each_setting_is_documented_with_its_default(path: str) -> None:
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    row = next((line for line in text.splitlines() if line.startswith(f"| `{path}` |")), "")
    default = setting_paths()[path].default
    if isinstance(default, float):
        default = f"{default:g}"
    shown = "unset" if default in {"", None} else f"`{default}`"
    if default is msgspec.NODEFAULT:
        shown = "`{}`"
    assert row.split("|")[2].strip() == shown


def test_no_setting_is_documented_that_is_not_there() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    table = text[: text.index("## The plan file")]
    named = [line.split("`")[1] for line in table.splitlines() if line.startswith("| `")]
    assert named == list(setting_paths())


@pytest.mark.parametrize("name", ["two-shapes.yaml", "attach.yaml"])
def test_the_examples_are_sound(name: str) -> None:
    devices = tuple(Device(id=f"cpu:{index}", kind="cpu") for index in range(3))
    check_plan(load_plan(str(ROOT / "examples" / name)), devices)
