"""A mixture of experts made of the tiny model."""

from pathlib import Path

import numpy as np

from oserve.engines.checkpoints.folder import CONFIG, WEIGHTS, copy_others, once, write_json
from oserve.engines.checkpoints.tensors import read_tensors
from oserve.engines.tiny import Tensors, save_weights, tiny_config


def make_mixture_variant(path: Path, out: Path, *, experts: int = 4) -> Path:
    """Write a mixture of experts (Mixtral) made of the tiny model in ``path`` to ``out``.

    Each layer's experts are its MLP with rows turned up and down at random, two of them a token.
    Idempotent, as ``make_tiny_model``.
    """

    def write(folder: Path) -> None:
        source = np.random.default_rng(0)
        tensors: Tensors = {}
        for name, item in read_tensors(path / WEIGHTS).items():
            weight = item.make()
            prefix, found, kind = name.partition("mlp.")
            if not found:
                tensors[name] = weight
                continue
            block = prefix + "block_sparse_moe."
            own = {"gate_proj.weight": "w1", "up_proj.weight": "w3", "down_proj.weight": "w2"}[kind]
            for expert in range(experts):
                turned = source.uniform(0.5, 1.5, (weight.shape[0], 1)).astype(np.float32)
                tensors[f"{block}experts.{expert}.{own}.weight"] = weight * turned
            if own == "w1":
                router = source.standard_normal((experts, weight.shape[1])) / 4
                tensors[block + "gate.weight"] = router.astype(np.float32)
        save_weights(folder, tensors)
        copy_others(path, folder)
        config = {
            name: value
            for name, value in tiny_config().items()
            if name not in {"attention_bias", "mlp_bias"}
        }
        write_json(
            folder / CONFIG,
            config
            | {
                "architectures": ["MixtralForCausalLM"],
                "model_type": "mixtral",
                "num_local_experts": experts,
                "num_experts_per_tok": 2,
                "sliding_window": None,
            },
        )

    return once(out, write)
