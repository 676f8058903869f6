"""Writes the parameters in ``tests/perf/models/truth.json`` again, as transformers counts them.

Each configuration beside it is built on the meta device, which takes no memory but some seconds
each: ``python benchmarks/perf/models.py [NAME ...]``. What transformers cannot build keeps its row.
KV bytes and contexts are written by ``models_by_vllm.py`` and kept as they are.
"""

import json
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "tests/perf/models"
ALIKE = {"kimi_k2": "deepseek_v3"}


def count(config: dict[str, Any]) -> int:
    """Parameters of the model that transformers makes of the configuration."""
    import torch  # noqa: PLC0415 - takes seconds
    from transformers import (  # noqa: PLC0415
        CONFIG_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    plain = {name: value for name, value in config.items() if name != "quantization_config"}
    if isinstance(plain.get("sliding_window_pattern"), str):
        # The class counts a period; the checkpoints give a pattern of letters.
        plain["sliding_window_pattern"] = len(plain["sliding_window_pattern"])
    kind = ALIKE.get(config["model_type"], config["model_type"])
    auto = AutoModelForImageTextToText if "text_config" in config else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(CONFIG_MAPPING[kind].from_dict(plain))
    return sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    from importlib.metadata import version  # noqa: PLC0415

    configs = json.loads((FOLDER / "configs.json").read_text())
    truth = json.loads((FOLDER / "truth.json").read_text())
    for name in sys.argv[1:] or configs:
        try:
            found = count(configs[name])
        except Exception as error:  # a family that this release lacks or refuses
            print(f"{name}: {error!r}"[:200])
            continue
        row = truth.setdefault(name, {})
        print(f"{name}: {found:,} (was {row.get('parameters', 0):,})", flush=True)
        row |= {"parameters": found, "by": f"transformers {version('transformers')}, meta device"}
    rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in truth.items())
    (FOLDER / "truth.json").write_text("{\n" + rows + "\n}\n")


if __name__ == "__main__":
    main()
