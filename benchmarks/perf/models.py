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
    return count_blocks(config) if "block_configs" in config else sum(sizes(config).values())


def sizes(config: dict[str, Any]) -> dict[str, int]:
    """Parameters by name."""
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
    return {name: parameter.numel() for name, parameter in model.named_parameters()}


def count_blocks(config: dict[str, Any]) -> int:
    """Parameters of Nemotron-NAS's layers, which are Llama's of sizes of their own.

    transformers has no class of it, so each block is a Llama of one layer, counted by parts.
    """
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    found: int = 2 * config["vocab_size"] * hidden
    for block in config["block_configs"]:
        attention, mlp = block["attention"], block["ffn"]
        own = {
            "model_type": "llama",
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // (attention["n_heads_in_group"] or heads),
            # In steps of 256, as the model's own code rounds.
            "intermediate_size": -(-int(2 * (mlp["ffn_mult"] or 1) * hidden / 3) // 256) * 256,
            "num_hidden_layers": 1,
            "vocab_size": 1,
        }
        for name, size in sizes(own).items():
            left_out = (".self_attn." in name and attention["no_op"]) or (
                ".mlp." in name and mlp["no_op"]
            )
            found += size if ".layers." in name and not left_out else 0
    return found


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
