"""The data files beside the code: models, devices, links, coefficients."""

import difflib
import functools
from collections.abc import Iterable
from importlib import resources
from typing import Any

import yaml


@functools.cache
def catalogue(name: str) -> dict[str, Any]:
    """One of the YAML files in ``perf/data``, by its name without the ending."""
    text = resources.files("oserve.perf").joinpath(f"data/{name}.yaml").read_text("utf-8")
    loaded: dict[str, Any] = yaml.safe_load(text)
    return loaded


def nearest(wanted: str, known: Iterable[str]) -> str:
    """`` (did you mean ...?)`` for a misspelt name; empty if no name is close."""
    close = difflib.get_close_matches(wanted, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""
