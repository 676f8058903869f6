"""What a patch is, and whether the code that it replaces still is what it was written for.

A digest of its source identifies a target: of tokens only, so that comments, docstrings and layout
may change. A process that applies the patch takes it of the loaded function; ``installed_misfit``
takes it of the installed files and imports nothing. This module imports neither torch nor vLLM.
"""

import ast
import hashlib
import importlib
import importlib.util
import inspect
import io
import linecache
import token
import tokenize
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any, Literal

PatchStage = Literal["zygote", "engine", "worker"]
"""Where patches are applied: in the zygote once vLLM is imported; in an engine's first process,
right after the fork; in each worker, when it loads the worker extension."""

_LAYOUT = {
    token.COMMENT,
    token.NL,
    token.NEWLINE,
    token.INDENT,
    token.DEDENT,
    token.ENCODING,
    token.ENDMARKER,
}


_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class PatchError(Exception):
    """A needed patch that does not fit; the text says which, and why."""


class _MisfitError(Exception):
    """Why a target is not the code that the patch was written for."""


def _always() -> bool:
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchTarget:
    """One attribute that is replaced.

    ``place``: ``module:qualified.name`` of the attribute. ``source``: the function whose digest is
    compared, where that is not ``place`` (a name that was imported or inherited, a constant).
    ``digest``: of that function, see ``digest_of``. ``replace`` receives the present value (of a
    class method, its function) and returns the new one.
    """

    place: str
    digest: str
    # A function, a class method's function or a constant: each replacement knows which.
    replace: Callable[[Any], Any]
    source: str = ""

    @property
    def read(self) -> str:
        """The function whose digest is compared."""
        return self.source or self.place


@dataclass(frozen=True, slots=True, kw_only=True)
class Patch:
    """Targets that are replaced together or not at all.

    ``reason``: the problem that it solves. ``without``: the effect of leaving it out.
    ``upstream``: reports and changes there. ``made_for``: the version of the package that the
    digests were taken from. ``needed``: engines are not started this way without it. ``wanted``:
    whether it applies, called in the process that applies it.
    """

    name: str
    stage: PatchStage
    made_for: str
    targets: tuple[PatchTarget, ...]
    reason: str
    without: str
    upstream: str
    needed: bool = False
    wanted: Callable[[], bool] = _always


def misfit(patch: Patch) -> str:
    """Why a patch does not fit the loaded code; empty if it fits. Imports its modules."""
    try:
        for target in patch.targets:
            look_up(target.place)
            _compare(target, _loaded_source(look_up(target.read)), patch.made_for)
    except _MisfitError as error:
        return str(error)
    return ""


def installed_misfit(patch: Patch) -> str:
    """As ``misfit``, but of the installed files; imports nothing of the package."""
    try:
        for target in patch.targets:
            module, _, name = target.place.partition(":")
            if name.split(".")[0] not in set(_bound(_tree(module).body)):
                raise _MisfitError(f"there is no {target.place}")
            _compare(target, installed_source(target.read), patch.made_for)
    except _MisfitError as error:
        return str(error)
    return ""


def put_in_place(target: PatchTarget) -> None:
    """Replace the attribute; the caller has checked ``misfit``."""
    module, _, name = target.place.partition(":")
    holder, _, last = name.rpartition(".")
    owner = look_up(f"{module}:{holder}") if holder else importlib.import_module(module)
    found = inspect.getattr_static(owner, last)
    if isinstance(found, classmethod):
        setattr(owner, last, classmethod(target.replace(found.__func__)))
    else:
        setattr(owner, last, target.replace(found))


def look_up(place: str) -> object:
    """The value at ``module:qualified.name``; of a class method, its function."""
    module, _, name = place.partition(":")
    try:
        found: object = importlib.import_module(module)
        for part in name.split("."):
            found = inspect.getattr_static(found, part)
    except (ImportError, AttributeError) as error:
        raise _MisfitError(f"there is no {place}") from error
    return found.__func__ if isinstance(found, classmethod) else found


def digest_of(source: str) -> str:
    """Sixteen hexadecimal digits of a function's tokens, without layout, comments and docstring.

    White space inside tokens is left out too, since Python 3.12 splits f-strings differently.
    """
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    text = "".join(one.string for one in _without_docstring(tokens))
    return hashlib.sha256("".join(text.split()).encode()).hexdigest()[:16]


def installed_source(place: str) -> str:
    """The text of a function in the installed files."""
    module, _, name = place.partition(":")
    body: list[ast.stmt] = _tree(module).body
    node: _Definition | None = None
    for part in name.split("."):
        definitions = (one for one in body if isinstance(one, _Definition))
        node = next((one for one in definitions if one.name == part), None)
        if node is None:
            raise _MisfitError(f"there is no {place}")
        body = node.body
    if node is None:
        raise _MisfitError(f"{place} names no function")
    lines = _file(module).read_text(encoding="utf-8").splitlines(keepends=True)
    first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
    return "".join(lines[first - 1 : node.end_lineno])


def _compare(target: PatchTarget, source: str, made_for: str) -> None:
    if digest_of(source) != target.digest:
        raise _MisfitError(f"{target.read} is not what it was in {made_for}")


def _loaded_source(found: object) -> str:
    function = inspect.unwrap(found) if callable(found) else found
    if not isinstance(function, FunctionType):
        raise _MisfitError(f"{found!r} is not a function written in Python")
    # Not inspect.getsource: it looks through every loaded module first.
    code = function.__code__
    lines = linecache.getlines(code.co_filename)[code.co_firstlineno - 1 :]
    if not lines:
        raise _MisfitError(f"the source of {function.__qualname__} cannot be read")
    return "".join(inspect.getblock(lines))


def _without_docstring(tokens: Iterable[tokenize.TokenInfo]) -> Iterator[tokenize.TokenInfo]:
    """Tokens with an effect; a string that is a statement of its own has none."""
    statement_begins = True
    for one in tokens:
        if one.type in _LAYOUT:
            statement_begins = statement_begins or one.type in {token.NEWLINE, token.INDENT}
        elif not (one.type == token.STRING and statement_begins):
            statement_begins = False
            yield one


def _file(module: str) -> Path:
    root, *parts = module.split(".")
    found = importlib.util.find_spec(root)
    if found is None or not found.submodule_search_locations:
        raise _MisfitError(f"{root} is not installed")
    path = Path(next(iter(found.submodule_search_locations))).joinpath(*parts)
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if not path.is_file():
        raise _MisfitError(f"there is no {module}")
    return path


def _tree(module: str) -> ast.Module:
    return ast.parse(_file(module).read_text(encoding="utf-8"))


def _bound(body: Iterable[ast.stmt]) -> Iterator[str]:
    """Names that a module's statements bind; those under an ``if`` too."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (name.asname or name.name for name in node.names)
        elif isinstance(node, ast.Assign):
            yield from (one.id for one in node.targets if isinstance(one, ast.Name))
        elif isinstance(node, ast.If):
            yield from _bound([*node.body, *node.orelse])
