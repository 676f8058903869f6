"""Packages are installed from lists of pins, each without its dependencies: none may be missing."""

import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
# What is installed before the packages of each list.
LISTS = {
    "core": (),
    "dev": ("core",),
    "engine-cpu": ("core",),
    "forecast": ("core", "dev"),
    "gguf": ("core",),
    "ray": ("core", "dev", "engine-cpu"),
}
# What is not loaded for what is done here: by vLLM on CPU for text, and by gguf and tokenizers for
# files that are at hand.
FETCHING = {"huggingface-hub", "requests", "tqdm"}
LEFT_OUT = {
    "engine-cpu": {"torchaudio", "torchcodec", "torchvision", "triton"},
    "dev": FETCHING,
    "gguf": FETCHING,
}


def pins(name: str) -> dict[str, str]:
    """Package to version, as one list has them."""
    lines = (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(item.name): str(item.specifier) for item in found}


def needed(requirements: list[str]) -> set[str]:
    """Packages that these ask for on this platform, without their extras."""
    wanted = [Requirement(text) for text in requirements]
    return {
        canonicalize_name(item.name)
        for item in wanted
        if item.marker is None or item.marker.evaluate({"extra": ""})
    }


@pytest.mark.parametrize("name", LISTS)
def test_a_list_of_pins_lacks_nothing(name: str) -> None:
    own = pins(name)
    have = set(own).union(*(pins(other) for other in LISTS[name])) | LEFT_OUT.get(name, set())
    for package in own:
        try:
            requirements = metadata.requires(package) or []
        except metadata.PackageNotFoundError:
            # Not installed here: what it needs is not known.
            continue
        assert needed(requirements) <= have, f"{package} needs more than {name}.txt has"


def test_what_the_project_declares_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert needed(project["dependencies"]) <= set(pins("core"))
    extras = project["optional-dependencies"]
    declared = needed([*extras["dev"], *extras["plot"]]) - {"oserve"}
    assert declared <= set(pins("core")) | set(pins("dev"))


def test_lists_agree() -> None:
    """One environment takes them all: a package has one version in it."""
    seen: dict[str, str] = {}
    for name in LISTS:
        for package, version in pins(name).items():
            assert seen.setdefault(package, version) == version, (name, package)
