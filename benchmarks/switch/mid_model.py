"""A model of hidden size 1024 with random weights, for switches that must take a while."""

from pathlib import Path

import numpy as np

from oserve.engines.checkpoints.folder import CONFIG, once, write_json
from oserve.engines.checkpoints.tensors import FloatArray
from oserve.engines.tiny import VOCAB, Tensors, save_weights, tiny_config, write_tokenizer


def make_mid_model(path: Path, *, layers: int = 16, seed: int = 0) -> Path:
    """Write the model to ``path`` unless it is there: 504 MB in bf16 with 16 layers.

    Its weights are noise, so its answers mean nothing. Otherwise as ``make_tiny_model``.
    """

    def write(folder: Path) -> None:
        hidden, wide, key_rows = 1024, 4096, 512
        source = np.random.default_rng(seed)

        def normal(rows: int, columns: int) -> FloatArray:
            return source.standard_normal((rows, columns), dtype=np.float32) * np.float32(0.03)

        ones = np.ones(hidden, dtype=np.float32)
        tensors: Tensors = {
            "model.embed_tokens.weight": normal(VOCAB, hidden),
            "model.norm.weight": ones,
            "lm_head.weight": normal(VOCAB, hidden),
        }
        for layer in range(layers):
            prefix = f"model.layers.{layer}."
            for name, rows, columns in (
                ("self_attn.q_proj", hidden, hidden),
                ("self_attn.k_proj", key_rows, hidden),
                ("self_attn.v_proj", key_rows, hidden),
                ("self_attn.o_proj", hidden, hidden),
                ("mlp.gate_proj", wide, hidden),
                ("mlp.up_proj", wide, hidden),
                ("mlp.down_proj", hidden, wide),
            ):
                tensors[f"{prefix}{name}.weight"] = normal(rows, columns)
            for name in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{prefix}{name}.weight"] = ones
        save_weights(folder, tensors)
        write_tokenizer(folder)
        config = tiny_config() | {
            "hidden_size": hidden,
            "intermediate_size": wide,
            "num_hidden_layers": layers,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 64,
        }
        write_json(folder / CONFIG, config)

    return once(path, write)
