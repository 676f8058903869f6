"""What is published: metadata, files that go with the package, and how it is built and started."""

import fnmatch
import importlib.util
import re
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import oserve
from oserve.config import setting_paths

ROOT = Path(__file__).resolve().parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def release() -> ModuleType:
    """``tools/check_release.py``, which is no package's."""
    found = importlib.util.spec_from_file_location("release", ROOT / "tools/check_release.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_each_file_of_the_package_is_code_or_declared_data(release: ModuleType) -> None:
    declared = {
        f"{package.replace('.', '/')}/{pattern}"
        for package, patterns in PROJECT["tool"]["setuptools"]["package-data"].items()
        for pattern in patterns
    }
    files = release.package_files()
    left = {
        name
        for name in files
        if not name.endswith(".py") and not any(fnmatch.fnmatch(name, one) for one in declared)
    }
    assert left == set(), "add them to package-data, or they are in no wheel"
    assert all(any(fnmatch.fnmatch(name, one) for name in files) for one in declared)
    assert "oserve/py.typed" in files
    for name in {str(Path(name).parent) for name in files if name.endswith(".py")}:
        assert f"{name}/__init__.py" in files, "a folder without it is not found as a package"


def test_the_version_has_its_part_of_the_changelog(release: ModuleType) -> None:
    assert release.version() == oserve.__version__
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## \[(.+?)\](.*)$", text, re.MULTILINE)
    assert headings[0] == ("Unreleased", "")
    name, date = headings[1]
    assert name == oserve.__version__
    assert re.fullmatch(r" - \d{4}-\d\d-\d\d", date)


def test_the_licence_is_whole_and_named() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "9. Accepting Warranty or Additional Liability" in text
    assert PROJECT["project"]["license"] == "Apache-2.0"
    assert PROJECT["project"]["license-files"] == ["LICENSE"]


def test_nothing_is_published_with_placeholders(release: ModuleType) -> None:
    placeholders = release.PLACEHOLDER in str(PROJECT["project"]["urls"])
    assert bool(list(release.final_faults())) == placeholders


def test_the_workflow_runs_what_people_run() -> None:
    text = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    jobs = yaml.safe_load(text)["jobs"]
    steps = [step for job in jobs.values() for step in job["steps"]]
    ran = " ".join(step.get("run", "") for step in steps)
    for command in ("make check", "make test", "-m build", "tools/check_release.py"):
        assert command in ran
    for step in steps:
        if "uses" in step:
            assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"])
    assert all(job["timeout-minutes"] for job in jobs.values())


def test_settings_in_the_image_and_the_unit_exist() -> None:
    image = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    unit = (ROOT / "packaging/oserve.service").read_text(encoding="utf-8")
    known = {"OSERVE_" + path.replace(".", "_").upper() for path in setting_paths()}
    known |= {"OSERVE_CONFIG", "OSERVE_API_KEYS"}
    named = set(re.findall(r"OSERVE_[A-Z_]+", image + unit))
    assert named
    assert named <= known
    # Nothing that the image copies is left out of what is sent to be built.
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    for line in re.findall(r"^COPY (?!--from)(.+)$", image, re.MULTILINE):
        for name in line.split()[:-1]:
            assert f"!{name}" in ignored
            assert (ROOT / name).exists()


def test_the_unit_waits_longer_than_the_server() -> None:
    unit = (ROOT / "packaging/oserve.service").read_text(encoding="utf-8")
    limit_s = int(re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)[0])
    settings = setting_paths()
    graces_s = [
        settings[name].default for name in ("gateway.shutdown_grace_s", "engines.stop_grace_s")
    ]
    assert limit_s > sum(graces_s)
    again_s = int(re.findall(r"^RestartSec=(\d+)$", unit, re.MULTILINE)[0])
    assert again_s < settings["engines.orphan_grace_s"].default
