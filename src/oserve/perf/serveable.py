"""What vLLM serves, and how a configuration can be read."""

import importlib.util
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from oserve.core import OServeError
from oserve.perf.checked import CHECKED, TEXT_TYPES, WITHOUT_FACTS, why_refused
from oserve.perf.config_keys import ConfigKeys, architectures

BY_TABLE = "the defaults of transformers 5.19 that OServe ships"
BY_VALUES = "the values of the file alone: no defaults of its class are known"


def refuse_pooling(folder: Path, *, place: str) -> None:
    """Raise OServeError if the files beside a configuration make it a pooling model."""
    if _pools(folder):
        raise OServeError(
            "it is a pooling model (modules.json has a pooling module): vLLM computes embeddings "
            "with it, and generates no text",
            place=place,
            remedy="give a model that generates text",
        )


def refuse_unserved(config: Mapping[str, Any], *, place: str) -> None:
    """Raise OServeError for a model that vLLM would not serve, with vLLM's reason."""
    named = config.get("architectures")
    names = [str(name) for name in named] if isinstance(named, list) else []
    known = architectures()
    if not names or any(name in known["served"] for name in names):
        return
    shown = ", ".join(names)
    remedy = "give a model that vLLM 0.32 serves as a text generation model"
    if any(name in known["pooling"] for name in names):
        reason = f"{shown} is a pooling model: vLLM computes embeddings or scores with it, no text"
    elif any(name in known["draft"] for name in names):
        reason = f"{shown} is a draft for speculative decoding, not a model to serve"
    elif any(name in known["by_transformers"] for name in names):
        # vLLM runs such models by transformers' own code.
        return
    elif any(name in known["removed"] for name in names):
        last = next(known["removed"][name] for name in names if name in known["removed"])
        reason = f"vLLM served {shown} until {last} and no longer does"
    else:
        reason = f"vLLM 0.32 does not support the architecture {shown}"
    raise OServeError(reason, place=f"{place}:architectures", remedy=remedy)


def readable(config: Mapping[str, Any], *, place: str) -> tuple[Mapping[str, Any], str]:
    """The configuration as it can be read, and how.

    Checked ``model_type``s, the language model's with the outermost, are read as they are; others
    are completed by transformers' class, if that is installed. Raises OServeError otherwise, and
    for families that are known to be read wrongly.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise OServeError(
            "it has no model_type, so neither transformers nor vLLM can tell what it is",
            place=f"{place}:model_type",
            remedy="add the model_type of its family, such as llama",
        )
    keys = ConfigKeys(config, place=place)
    _refuse_misread((kind, keys.kind), place)
    if kind in CHECKED and keys.kind in TEXT_TYPES:
        return config, BY_TABLE if keys.shipped else BY_VALUES
    unknown = keys.kind if kind in CHECKED else kind
    if importlib.util.find_spec("transformers") is None:
        raise OServeError(
            f"model_type {unknown} is not among those that were checked, and transformers, which "
            "may know it, is not installed",
            place=f"{place}:model_type",
            remedy=f"pip install 'oserve[models]', or {WITHOUT_FACTS}",
        )
    whole = _completed(config, kind, place)
    found = ConfigKeys(whole, place=place).kind
    _refuse_misread((found,), place)
    named = kind if found == kind else f"{kind} with {found}"
    return whole, f"transformers {version('transformers')}, whose {named} was not checked"


def _refuse_misread(kinds: Sequence[str], place: str) -> None:
    for kind in kinds:
        why = why_refused(kind)
        if why is not None:
            raise OServeError(
                f"models of the type {kind} are not sized yet: {why}",
                place=f"{place}:model_type",
                remedy=WITHOUT_FACTS,
            )


def _completed(config: Mapping[str, Any], kind: str, place: str) -> Mapping[str, Any]:
    from transformers import CONFIG_MAPPING  # noqa: PLC0415 - takes seconds, and rarely needed

    if kind not in CONFIG_MAPPING:
        raise OServeError(
            f"transformers {version('transformers')} does not know model_type {kind}, and it is "
            "not among those that were checked",
            place=f"{place}:model_type",
            remedy=WITHOUT_FACTS,
        )
    try:
        whole: dict[str, Any] = CONFIG_MAPPING[kind].from_dict(dict(config)).to_dict()
    except Exception as error:  # its classes check what they like, each in its own way
        raise OServeError(
            f"transformers {version('transformers')} cannot read it: {error!r}",
            place=place,
            remedy=f"correct it, or {WITHOUT_FACTS}",
        ) from None
    return whole


def _pools(folder: Path) -> bool:
    """Whether sentence-transformers' modules include a pooling one, as vLLM looks for."""
    file = folder / "modules.json"
    try:
        modules = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(modules, list) and any(
        isinstance(one, dict) and str(one.get("type", "")).endswith(".Pooling") for one in modules
    )
