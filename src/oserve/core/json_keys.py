"""Duplicate keys in JSON objects, of which decoders silently keep the last."""

import json
import re

from oserve.core.errors import OServeError

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]:,]', re.DOTALL)


def refuse_duplicate_keys(text: str, *, place: str) -> None:
    """Raise OServeError for the first duplicate key of a valid JSON text; it names both lines."""
    # One entry per open object (its keys and their offsets) or array (None).
    open_: list[dict[str, int] | None] = []
    string = ""
    at = 0
    for found in _TOKEN.finditer(text):
        token = found[0]
        if token == "{":
            open_.append({})
        elif token == "[":
            open_.append(None)
        elif token in "}]":
            if open_:
                open_.pop()
        elif token == ":":
            keys = open_[-1] if open_ else None
            if keys is not None and string in keys:
                raise OServeError(
                    f"the key {string!r} appears twice, first in line {_line(text, keys[string])}",
                    place=f"{place}:{_line(text, at)}",
                    remedy="remove one of the two",
                )
            if keys is not None:
                keys[string] = at
        elif token != ",":
            string, at = json.loads(token, strict=False), found.start()


def _line(text: str, offset: int) -> int:
    return text.count("\n", 0, offset) + 1
