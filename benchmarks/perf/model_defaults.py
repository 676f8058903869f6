"""Writes the class defaults of configurations, and vLLM's architectures, that planning ships.

``python benchmarks/perf/model_defaults.py`` needs transformers and the source of vLLM, loads no
weights and no network. What it writes are facts: numbers and names.
"""

import ast
import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from oserve.perf.checked import CHECKED, KEYS

DATA = Path(__file__).parents[2] / "src/oserve/perf/data/checked"


def class_row(kind: str) -> dict[str, Any] | None:
    """The defaults of the keys that planning reads; ``None`` if transformers lacks the type."""
    from transformers import CONFIG_MAPPING  # noqa: PLC0415 - takes seconds

    if kind not in CONFIG_MAPPING:
        return None
    own = CONFIG_MAPPING[kind]
    given: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(own)}
    plain = (int, float, str, bool, list)
    defaults = {
        name: value
        for name, value in sorted(given.items())
        if name in KEYS and isinstance(value, plain)
    }
    row: dict[str, Any] = {"defaults": defaults}
    names = {
        str(new): str(old)
        for new, old in dict(own.attribute_map or {}).items()
        if {new, old} & set(KEYS)
    }
    if names:
        row["names"] = names
    parts: dict[str, Any] = dict(own.sub_configs or {})
    for key in ("text_config", "thinker_config"):
        inner = str(getattr(parts.get(key), "model_type", ""))
        if inner:
            row["text"] = inner
    return row


def architectures() -> dict[str, Any]:
    """The names in vLLM's registry, read from its source."""
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        sys.exit("needs vLLM's source")
    source = Path(found.origin).parent / "model_executor/models/registry.py"
    tables: dict[str, dict[str, Any]] = {}
    for node in ast.parse(source.read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            target = node.targets[0]
            assert isinstance(target, ast.Name)
            tables[target.id] = {
                str(key.value): value.value if isinstance(value, ast.Constant) else None
                for key, value in zip(node.value.keys, node.value.values, strict=True)
                if isinstance(key, ast.Constant)
            }
    served = ("_TEXT_GENERATION_MODELS", "_MULTIMODAL_MODELS", "_TRANSFORMERS_SUPPORTED_MODELS")
    pooling = (
        "_EMBEDDING_MODELS",
        "_LATE_INTERACTION_MODELS",
        "_REWARD_MODELS",
        "_TOKEN_CLASSIFICATION_MODELS",
        "_SEQUENCE_CLASSIFICATION_MODELS",
    )
    generating = {name for table in served for name in tables[table]}
    return {
        "by_transformers": sorted(_transformers_classes() - generating),
        "served": sorted(generating),
        "pooling": sorted({n for table in pooling for n in tables[table]} - generating),
        "draft": sorted(tables["_SPECULATIVE_DECODING_MODELS"]),
        "removed": tables["_PREVIOUSLY_SUPPORTED_MODELS"],
    }


def _transformers_classes() -> set[str]:
    """The classes that transformers makes for text generation, read from its source."""
    found = importlib.util.find_spec("transformers")
    assert found is not None
    assert found.origin is not None
    source = Path(found.origin).parent / "models/auto/modeling_auto.py"
    for node in ast.parse(source.read_text()).body:
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
            continue
        if node.targets[0].id == "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES":
            names = {
                str(one.value) for one in ast.walk(node.value) if isinstance(one, ast.Constant)
            }
            return {name for name in names if name.endswith("CausalLM")}
    return set()


def main() -> None:
    DATA.mkdir(exist_ok=True)
    write("architectures", architectures())
    rows = {kind: row for kind in sorted(CHECKED) if (row := class_row(kind)) is not None}
    write("model_types", rows)
    print("not in transformers:", sorted(CHECKED - set(rows)))


def write(name: str, value: dict[str, Any]) -> None:
    lines = ",\n".join(
        f"{json.dumps(key)}: {json.dumps(row, sort_keys=True)}" for key, row in value.items()
    )
    (DATA / f"{name}.json").write_text("{\n" + lines + "\n}\n")


if __name__ == "__main__":
    main()
