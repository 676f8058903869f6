"""Reading YAML files into typed values, with errors that name the place and the nearest word."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import msgspec
import yaml

from oserve.core import OServeError


def read_text(path: Path) -> str:
    """The file's text; raises OServeError for one that cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise OServeError(
            f"cannot read it: {reason}", place=str(path), remedy="check the path"
        ) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The file's keys and values; raises OServeError with file, line and column."""
    return parse_yaml(read_text(path), place=str(path))


def parse_yaml(text: str, *, place: str) -> dict[str, Any]:
    """Keys and values of YAML; raises OServeError with place, line and column."""
    try:
        loaded = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{place}:{mark.line + 1}:{mark.column + 1}" if mark is not None else place
        problem = getattr(error, "problem", None) or "it is not valid YAML"
        raise OServeError(str(problem), place=where, remedy="correct the YAML") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise OServeError(
            "expected keys and values", place=place, remedy="see docs/configuration.md"
        )
    return loaded


def convert(value: Any, kind: Any, *, place: str) -> Any:
    """``value`` as a strict ``kind``; raises OServeError naming the path inside ``place``."""
    try:
        return msgspec.convert(value, kind, strict=True)
    except msgspec.ValidationError as error:
        text, _, path = str(error).partition(" - at `$")
        path = path.rstrip("`")
        unknown = re.search(r"unknown field `([^`]*)`", text)
        if unknown is None:
            where = f"{place}: {path.lstrip('.')}" if path else place
            raise OServeError(text, place=where, remedy="correct the value") from None
        name = unknown.group(1)
        known = _fields_at(kind, path)
        close = difflib.get_close_matches(name, known, n=1)
        remedy = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"
        where = f"{place}: {(path + '.' + name).lstrip('.')}"
        raise OServeError(f"unknown key {name!r}", place=where, remedy=remedy) from None


def _fields_at(kind: Any, path: str) -> list[str]:
    """Names allowed where ``path`` (msgspec's, such as ``.replicas[0].shape``) leads."""
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


def suggest(name: str, known: Sequence[str], otherwise: str) -> str:
    """A remedy: the nearest known name, or ``otherwise``."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else otherwise
