"""What README and docs name exists: links, tests, commands and options, settings, metrics."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from typer.testing import CliRunner

from oserve.cli import app
from oserve.config import setting_paths

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "oserve"
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"))
}


def named(pattern: str, flags: int = 0) -> Iterator[tuple[str, str]]:
    """Page and what the pattern's one group found on it."""
    found = [
        (page, one) for page, text in PAGES.items() for one in re.findall(pattern, text, flags)
    ]
    assert found, "the pattern finds nothing any more"
    yield from found


def anchors(text: str) -> set[str]:
    """As forges make them of headings."""
    plain = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", plain, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def commands() -> dict[str, set[str]]:
    """Options of each command, by its name (``forecast train``)."""
    found = {}

    def walk(command: Any, words: tuple[str, ...]) -> None:
        options = {
            option
            for parameter in command.params
            for option in (*parameter.opts, *parameter.secondary_opts)
        }
        found[" ".join(words)] = options | {"--help"}
        for name, one in getattr(command, "commands", {}).items():
            walk(one, (*words, name))
            if name == "run":
                # Said or not: ``oserve forecast TRACE``.
                found[" ".join(words)] |= found[" ".join((*words, name))]

    walk(typer.main.get_command(app), ())
    return found


def test_every_command_explains_itself() -> None:
    """Help is marked up: brackets in it must not be taken for that."""
    for words in sorted(commands()):
        result = CliRunner().invoke(app, [*words.split(), "--help"], env={"COLUMNS": "200"})
        assert result.exit_code == 0, (words, result.exception)
        assert "Usage" in result.output
    told = CliRunner().invoke(app, ["plan", "--help"], env={"COLUMNS": "200"}).output
    assert "NAME=TTFT_MS/TPOT_MS[/PRECISION" in re.sub(r"[\s│]+", "", told)


def test_links_lead_somewhere() -> None:
    missing = []
    for page, target in named(r"\]\((?!https://)([^)\s]+)\)"):
        name, _, anchor = target.partition("#")
        place = (ROOT / page).parent.joinpath(name).resolve() if name else ROOT / page
        known = anchors(PAGES.get(str(place.relative_to(ROOT)), "")) | {""}
        if not place.exists() or anchor not in known:
            missing.append((page, target))
    assert missing == []


def test_named_files_and_tests_exist() -> None:
    missing = []
    for page, name in named(r"`((?:[\w-]+/)+[\w-]+\.(?:py|md|yaml)(?:::\w+)?)`"):
        file, _, test = name.partition("::")
        places = [ROOT / file, PACKAGE / file, ROOT / "tests" / file, ROOT / "src" / file]
        text = next((one.read_text(encoding="utf-8") for one in places if one.is_file()), None)
        if text is None or (test and f"def {test}(" not in text):
            missing.append((page, name))
    assert missing == []


def test_named_commands_have_the_named_options() -> None:
    known = commands()
    assert {"serve", "plan", "forecast train"} <= known.keys()
    missing = []
    # On a line of its own, where it may go on behind a backslash, or in the text.
    pattern = r"(?:^|`)(?:[\w./]*/)?oserve ((?:[^\n`#|;\\]|\\\n)+)"
    for page, line in named(pattern, re.MULTILINE):
        words = line.replace("\\\n", " ").split()
        name = words[0] if not words[0].startswith("-") else ""
        if (longer := " ".join(words[:2])) in known:
            name = longer
        if name not in known:
            missing.append((page, line))
            continue
        options = {word.partition("=")[0] for word in words if word.startswith("--")}
        missing += [(page, f"{name} {option}") for option in options - known[name]]
    assert missing == []


def test_named_settings_and_modules_exist() -> None:
    known = setting_paths()
    sections = {path.partition(".")[0] for path in known if "." in path}
    missing = []
    for page, name in named(rf"`((?:{'|'.join(sections)})(?:\.[a-z_0-9]+)+)`"):
        setting = name in known or any(path.startswith(f"{name}.") for path in known)
        module = PACKAGE.joinpath(*name.split("."))
        # What was decided and what changed may name settings that are gone.
        past = page.startswith(("CHANGELOG", "docs/decisions/"))
        if not (setting or past or module.is_dir() or module.with_suffix(".py").is_file()):
            missing.append((page, name))
    assert missing == []


def test_named_metrics_exist() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    # Counters are given without the ending that Prometheus puts behind them.
    names = set(named(r"`(oserve_[a-z_]+)"))
    assert [one for one in names if one[1].removesuffix("_total") not in source] == []
