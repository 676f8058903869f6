"""The values of a model's configuration, as its class in transformers completes them.

A ``config.json`` may leave out what equals its class's default, use older names of keys, and nest
the language model. ``data/checked/model_types.json`` holds the defaults of the ``model_type``s that
were checked, taken from transformers by ``benchmarks/perf/model_defaults.py``.
"""

import functools
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

from oserve.core import OServeError

# Types of the same class as others.
_ALIKE = {"kimi_k2": "deepseek_v3"}
# Under these keys multimodal models nest their language model.
_NESTED = ("text_config", "llm_config", "language_config")


@functools.cache
def checked_types() -> Mapping[str, Mapping[str, Any]]:
    """The class defaults by checked ``model_type``: ``defaults``, ``names`` and ``text``.

    ``names``: key in the file by the name that the class gives it. ``text``: the ``model_type`` of
    a nested language model.
    """
    loaded: dict[str, dict[str, Any]] = _data("model_types")
    return loaded


@functools.cache
def architectures() -> Mapping[str, Any]:
    """vLLM's architectures: ``served``, ``pooling`` and, with the last version, ``removed``."""
    loaded: dict[str, Any] = _data("architectures")
    return loaded


def _data(name: str) -> Any:
    file = resources.files("oserve.perf").joinpath(f"data/checked/{name}.json")
    return json.loads(file.read_text("utf-8"))


def _row(kind: str) -> Mapping[str, Any]:
    return checked_types().get(_ALIKE.get(kind, kind), {})


class ConfigKeys:
    """Reads a configuration's values by name; bad values raise OServeError naming the field.

    ``outer``: the whole file; ``text``: its language model's part; ``kind``: that part's type.
    """

    def __init__(self, config: Mapping[str, Any], *, place: str) -> None:
        self.outer = config
        self.place = place
        outer_type = config.get("model_type")
        row = _row(str(outer_type))
        self.text: Mapping[str, Any] = config
        self.kind = str(outer_type)
        for key in _NESTED:
            inner = self.text.get(key)
            if isinstance(inner, Mapping):
                self.text = inner
                self.place = f"{self.place}:{key}"
                self.kind = str(inner.get("model_type") or row.get("text") or outer_type)
                row = _row(self.kind)
        if not self.nested and row.get("text"):
            # Older files of multimodal models give the language model's values themselves.
            self.kind = str(row["text"])
            row = _row(self.kind)
        self._outer_defaults = _row(str(outer_type)).get("defaults", {})
        self._defaults: Mapping[str, Any] = row.get("defaults", {})
        self._names: Mapping[str, str] = row.get("names", {})

    @property
    def shipped(self) -> bool:
        """Whether the defaults of the language model's class are known."""
        return bool(_row(self.kind))

    @property
    def nested(self) -> bool:
        """Whether the language model is a part of the configuration."""
        return self.text is not self.outer

    def value(self, *names: str) -> Any:
        """The first value that is given under one of the names, or else the class's default."""
        for name in names:
            for key in (name, self._names.get(name)):
                if key is not None and self.text.get(key) is not None:
                    return self.text[key]
        for name in names:
            # A null in the file stands, except where the class replaces it.
            if self._defaults.get(name) is not None and name not in self.text:
                return self._defaults[name]
        return None

    def count(self, *names: str) -> int:
        """A count of at least 1; raises OServeError if it is missing."""
        found = self.optional(*names)
        if found is None:
            raise OServeError(
                f"the field {names[0]} is missing",
                place=self.place,
                remedy="give a complete config.json",
            )
        return found

    def optional(self, *names: str, least: int = 1) -> int | None:
        """A count of at least ``least``, or ``None``."""
        value = self.value(*names)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            name = next((one for one in names if one in self.text), names[0])
            raise OServeError(
                f"{name} is {value!r}, not a count of at least {least}",
                place=f"{self.place}:{name}",
                remedy="correct it",
            )
        return value

    def natural(self, *names: str) -> int:
        """A count; 0 if it is missing."""
        return self.optional(*names, least=0) or 0

    def flag(self, name: str) -> bool:
        return bool(self.value(name))

    def list(self, *names: str) -> tuple[Any, ...]:
        """A list; empty if it is missing."""
        value = self.value(*names)
        return tuple(value) if isinstance(value, list | tuple) else ()

    def tied(self) -> bool:
        """Whether the LM head is the embedding; the outermost mention counts, as in vLLM."""
        for part in (self.text, self.outer):
            if isinstance(part.get("tie_word_embeddings"), bool):
                return bool(part["tie_word_embeddings"])
        default = self._defaults.get("tie_word_embeddings")
        if default is None:
            default = self._outer_defaults.get("tie_word_embeddings", False)
        return bool(default)
