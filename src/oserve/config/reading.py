"""Files as typed values, with errors that name the place and the nearest known name.

Files are YAML, or JSON by their suffix. Both are parsed strictly: a duplicate key, a number that is
not finite, and an alias that is recursive or expands too far are errors with line and column.
"""

import difflib
import json
import math
import re
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import msgspec
import yaml

from oserve.core import OServeError
from oserve.core.json_keys import refuse_duplicate_keys

Converted = TypeVar("Converted")

_MAX_NODES = 200_000
"""Most values of a document with its aliases expanded; enough for thousands of replicas."""


def read_text(path: Path) -> str:
    """The file's text without a byte order mark; raises OServeError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        remedy = "check the path"
        if isinstance(error, UnicodeDecodeError):
            line = error.object[: error.start].count(b"\n") + 1
            reason, remedy = f"{reason} (line {line})", "save it as UTF-8"
        raise OServeError(f"cannot read it: {reason}", place=str(path), remedy=remedy) from None


def read_document(path: Path) -> dict[str, Any]:
    """Keys and values of a file: JSON if its suffix is ``.json``, else YAML.

    Raises OServeError with file, line and column.
    """
    parse = parse_json if path.suffix == ".json" else parse_yaml
    return parse(read_text(path), place=str(path))


def parse_yaml(text: str, *, place: str) -> dict[str, Any]:
    """Keys and values of YAML; raises OServeError with place, line and column."""
    return _mapping(parse_yaml_value(text, place=place), place)


def parse_yaml_value(text: str, *, place: str) -> Any:
    """Any YAML value, for instance from the command line; raises OServeError if invalid."""
    try:
        return _load(text)
    except _StrictError as error:
        raise OServeError(
            error.message, place=_at(place, error.mark), remedy=error.remedy
        ) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or getattr(error, "reason", None)
        raise OServeError(
            str(problem or "it is not valid YAML"),
            place=_at(place, mark),
            remedy="correct the YAML",
        ) from None
    except RecursionError:
        raise OServeError("it is nested too deeply", place=place, remedy="correct it") from None
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        # The constructors of PyYAML raise these for 2024-13-01, or for a tag such as !!bool x.
        raise OServeError(
            f"it holds a value that makes no sense: {error}",
            place=place,
            remedy="put it in quotes if it is text",
        ) from None


def parse_json(text: str, *, place: str) -> dict[str, Any]:
    """Keys and values of JSON; raises OServeError with place, line and column."""
    try:
        loaded = (
            json.loads(text, parse_constant=_finite, parse_float=_finite) if text.strip() else None
        )
    except json.JSONDecodeError as error:
        raise OServeError(
            f"it is not valid JSON: {error.msg}",
            place=f"{place}:{error.lineno}:{error.colno}",
            remedy="correct the JSON",
        ) from None
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise OServeError(reason, place=place, remedy="correct the JSON") from None
    refuse_duplicate_keys(text, place=place)
    return _mapping(loaded, place)


def convert(value: object, kind: type[Converted], *, place: str) -> Converted:
    """``value`` as the type ``kind``, strictly; raises OServeError naming the path in ``place``."""
    try:
        return msgspec.convert(value, kind, strict=True)
    except msgspec.ValidationError as error:
        text, _, path = str(error).partition(" - at `$")
        path = path.rstrip("`")
        unknown = re.search(r"unknown field `([^`]*)`", text)
        if unknown is None:
            where = f"{place}: {path.lstrip('.')}" if path else place
            raise OServeError(text, place=where, remedy=_correction(text)) from None
        name = unknown.group(1)
        known = _fields_at(kind, path)
        close = difflib.get_close_matches(name, known, n=1)
        remedy = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"
        where = f"{place}: {(path + '.' + name).lstrip('.')}"
        raise OServeError(f"unknown key {name!r}", place=where, remedy=remedy) from None


def suggest(name: str, known: Sequence[str], otherwise: str) -> str:
    """A remedy that suggests the nearest known name, or ``otherwise``."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else otherwise


class _StrictError(Exception):
    """Valid YAML that is refused here, and its position."""

    def __init__(self, message: str, mark: yaml.Mark, remedy: str) -> None:
        super().__init__(message)
        self.message, self.mark, self.remedy = message, mark, remedy


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which also refuses duplicate keys and numbers that are not finite."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._flattened: set[int] = set()

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        # Check before the keys of a merge (<<) are added, since the mapping may override them.
        # PyYAML comes here again for each mapping that this one is merged into.
        if id(node) in self._flattened:
            return
        self._flattened.add(id(node))
        seen: dict[Hashable, yaml.Mark] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue
            if key in seen:
                raise _StrictError(
                    f"the key {key!r} appears twice, first in line {seen[key].line + 1}",
                    key_node.start_mark,
                    "leave one of the two out",
                )
            seen[key] = key_node.start_mark
        super().flatten_mapping(node)

    def construct_finite(self, node: yaml.ScalarNode) -> float:
        value = float(self.construct_yaml_float(node))
        if not math.isfinite(value):
            raise _StrictError(f"{node.value} is no number", node.start_mark, "give a finite one")
        return value


_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_finite)


def _load(text: str) -> Any:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {}, set())
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _count(node: yaml.Node, known: dict[int, int], above: set[int]) -> int:
    """Nodes of this subtree with aliases expanded; raises _StrictError beyond the limit."""
    if id(node) in known:
        return known[id(node)]
    if id(node) in above:
        raise _StrictError("an alias stands inside itself", node.start_mark, "write it out")
    above.add(id(node))
    total = 1 + sum(_count(child, known, above) for child in _children(node))
    above.remove(id(node))
    if total > _MAX_NODES:
        raise _StrictError(
            f"with its aliases it holds over {_MAX_NODES:,} values", node.start_mark, "shorten it"
        )
    known[id(node)] = total
    return total


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        yield from node.value
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield key
            yield value


def _mapping(loaded: Any, place: str) -> dict[str, Any]:
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise OServeError(
            "expected keys and values", place=place, remedy="see docs/configuration.md"
        )
    return loaded


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is no finite number")
    return value


def _at(place: str, mark: yaml.Mark | None) -> str:
    return place if mark is None else f"{place}:{mark.line + 1}:{mark.column + 1}"


def _correction(text: str) -> str:
    if text.startswith("Expected `str`"):
        return "correct the value, or put it in quotes if it is text"
    if text.startswith("Expected `float`, got `str`"):
        return "give a number; YAML takes 1e5 for text and 1.0e+5 for a number"
    return "correct the value"


def _fields_at(kind: Any, path: str) -> list[str]:
    """Field names allowed at ``path``, in msgspec's form such as ``.replicas[0].shape``."""
    for step in re.findall(r"\.(\w+)|(\[[^\]]*\])", path):
        kind = _element(kind) if step[1] else _field_types(kind).get(step[0])
    return list(_field_types(_struct(kind)))


def _struct(kind: Any) -> Any:
    options = [kind, *get_args(kind)]
    return next((item for item in options if hasattr(item, "__struct_fields__")), kind)


def _element(kind: Any) -> Any:
    arguments = get_args(kind)
    return arguments[-1] if arguments else None


def _field_types(kind: Any) -> dict[str, Any]:
    kind = _struct(kind)
    if not hasattr(kind, "__struct_fields__"):
        return dict.fromkeys(getattr(kind, "__dataclass_fields__", {}))
    return {item.name: item.type for item in msgspec.structs.fields(kind)}
