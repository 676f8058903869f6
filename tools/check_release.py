"""Looks into a built wheel and source distribution: is all there that must be, and nothing else?

``python tools/check_release.py [--final] dist/*``. Standard library only. ``--final``: what is to
be published, so that addresses must be real. Exit code 1, with one line per fault.
"""

import argparse
import re
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "oserve"
PLACEHOLDER = "oserve.example"
BESIDE = ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "Makefile", "tools/setup.py")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--final", action="store_true", help="it is to be published")
    asked = parser.parse_args()
    faults = list(_version_faults())
    for pattern, look in (("*.whl", wheel_faults), ("*.tar.gz", source_faults)):
        found = [path for path in asked.files if path.match(pattern)]
        if len(found) != 1:
            faults.append(f"{len(found)} files of the form {pattern}, not one")
        faults += [fault for path in found for fault in look(path)]
    if asked.final:
        faults += final_faults()
    for fault in faults:
        print(fault, file=sys.stderr)
    if not faults:
        print(f"{version()}: all there that must be")
    return bool(faults)


def version() -> str:
    """As the sources say it."""
    text = (PACKAGE / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    return found[1] if found else ""


def package_files() -> set[str]:
    """What of the package's folder belongs to it, from the folder above it."""
    files = (path for path in PACKAGE.rglob("*") if path.is_file())
    return {
        str(path.relative_to(PACKAGE.parent)) for path in files if "__pycache__" not in path.parts
    }


def wheel_faults(path: Path) -> Iterator[str]:
    """Of a wheel."""
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        information = f"oserve-{version()}.dist-info"
        metadata = f"{information}/METADATA"
        text = archive.read(metadata).decode() if metadata in names else ""
    for needed in (metadata, f"{information}/licenses/LICENSE", f"{information}/entry_points.txt"):
        if needed not in names:
            yield f"{path.name}: there is no {needed}"
    for line in ("License-Expression: Apache-2.0", "Requires-Python: >=3.11"):
        if line not in text.splitlines():
            yield f"{path.name}: its metadata do not say {line!r}"
    own = {name for name in names if not name.startswith(information)}
    yield from (f"{path.name}: there is no {name}" for name in sorted(package_files() - own))
    yield from (f"{path.name}: {name} is too much" for name in sorted(own - package_files()))


def source_faults(path: Path) -> Iterator[str]:
    """Of a source distribution."""
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {*BESIDE, *(f"src/{name}" for name in package_files())}
    yield from (f"{path.name}: there is no {name}" for name in sorted(needed - names))
    unwanted = re.compile(r"(^|/)(\.venv|\.oserve|__pycache__|\.git)(/|$)")
    yield from (f"{path.name}: {name} is too much" for name in names if unwanted.search(name))


def final_faults() -> Iterator[str]:
    """Of what is about to be published."""
    if PLACEHOLDER in (ROOT / "pyproject.toml").read_text(encoding="utf-8"):
        yield f"pyproject.toml: addresses in {PLACEHOLDER} are placeholders"


def _version_faults() -> Iterator[str]:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    if not re.search(rf"^## \[{re.escape(version())}\] - \d{{4}}-\d\d-\d\d$", text, re.MULTILINE):
        yield f"CHANGELOG.md: no heading [{version()}] with its date"


if __name__ == "__main__":
    sys.exit(main())
