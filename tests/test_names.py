"""What the import contracts leave open: unique names, no import circles, short files."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp

SOURCES = Path(__file__).resolve().parents[1] / "src" / "oserve"
MOST_LINES = 400


@cache
def trees() -> dict[str, ast.Module]:
    """The syntax tree of each source file, by its path below the package."""
    return {
        str(path.relative_to(SOURCES)): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(SOURCES.rglob("*.py"))
    }


def definitions(file: str, tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield each public class or type alias: its name, and what it stands for.

    A class stands for itself. Aliases of one text are one thing, wherever they are written.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield node.name, f"class in {file}"
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                if isinstance(target, ast.Name) and re.fullmatch(r"[A-Z]+[a-z]\w*", target.id):
                    yield target.id, ast.unparse(node.value).replace("npt.", "")


def test_a_public_name_stands_for_one_thing() -> None:
    meanings: dict[str, set[str]] = defaultdict(set)
    for file, tree in trees().items():
        for name, meaning in definitions(file, tree):
            meanings[name].add(meaning)
    assert {name: sorted(found) for name, found in meanings.items() if len(found) > 1} == {}


def circles() -> Iterator[list[str]]:
    """Yield import circles until none is left. The graph has the imports inside functions too."""
    graph = grimp.build_graph("oserve", cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    while True:
        try:
            TopologicalSorter(imports).prepare()
        except CycleError as error:
            circle = list(reversed(error.args[1]))
            yield circle
            imports[circle[0]] = imports[circle[0]] - {circle[1]}
        else:
            return


def test_imports_run_in_no_circle() -> None:
    assert [" -> ".join(circle) for circle in circles()] == []


def test_no_file_is_too_long() -> None:
    lengths = {
        str(path.relative_to(SOURCES)): len(path.read_text(encoding="utf-8").splitlines())
        for path in SOURCES.rglob("*.py")
    }
    assert {file: lines for file, lines in lengths.items() if lines > MOST_LINES} == {}


def test_no_import_is_hidden_behind_type_checking() -> None:
    found = [
        file
        for file, tree in trees().items()
        if any(isinstance(node, ast.Name) and node.id == "TYPE_CHECKING" for node in ast.walk(tree))
    ]
    assert found == []


def without_reason(kind: type[ast.AST], pattern: str) -> list[str]:
    """Return the places of statements that match, and have no comment on or just above them."""
    found = []
    for file, tree in trees().items():
        lines = (SOURCES / file).read_text(encoding="utf-8").splitlines()
        for node in ast.walk(tree):
            if not isinstance(node, kind):
                continue
            line: int = node.lineno  # type: ignore[attr-defined]
            near = lines[line - 2 : line + 1]
            if re.search(pattern, lines[line - 1]) and not any("#" in text for text in near):
                found.append(f"{file}:{line}")
    return found


def test_each_assert_that_narrows_tells_its_reason() -> None:
    assert without_reason(ast.Assert, r"assert .*\b(is not None|isinstance)\b") == []


def test_each_broad_except_tells_its_reason() -> None:
    found = without_reason(ast.ExceptHandler, r"except(:| \(?(Base)?Exception\b)")
    assert found == []


def test_a_named_type_is_read_by_a_decoder_that_is_made_at_import() -> None:
    """With ``decode(..., type=T)`` msgspec 0.22 prepares T at its first use.

    Two threads that do so at once can end the process: the second one reads what the first has
    only begun. A decoder at the top of a module is ready before a thread can use it.
    """
    found = [
        f"{file}:{node.lineno}: {ast.unparse(node)}"
        for file, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("json.decode")
        for given in node.keywords
        if given.arg == "type" and not re.fullmatch(r"[a-z]+", ast.unparse(given.value))
    ]
    assert found == []


def test_decoders_are_made_at_import() -> None:
    found = [
        f"{file}:{node.lineno}: {ast.unparse(node)}"
        for file, tree in trees().items()
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".Decoder")
    ]
    assert found == []
