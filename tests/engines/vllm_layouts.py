"""Builds vLLM's own models without weights, as several ranks, and compares them with shard maps.

Run as a program with architectures and precisions (``LlamaForCausalLM=bf16,int8 ...``); prints a
line for each rank that was built, with the differences. One process plays every rank: its groups
are told other sizes and ranks.
"""

# vLLM reads its environment when it is imported.

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}

import torch
from vllm.config import (
    CacheConfig,
    DeviceConfig,
    ModelConfig,
    VllmConfig,
    set_current_vllm_config,
)
from vllm.distributed import parallel_state
from vllm.model_executor.models import ModelRegistry, registry
from vllm.utils.torch_utils import set_default_torch_dtype

from oserve.core import Precision
from oserve.perf.model import ModelFacts
from oserve.perf.model_config import model_from_config
from oserve.switch.layout import Layout, architecture_of, differences, shard_map
from oserve.switch.precision import WeightFormat

# vLLM looks at each model's class in a new process, which imports everything anew.
registry._run_in_subprocess = lambda inspect: inspect()

GROUP = 32
SIZES = ((1, 1), (2, 1), (4, 1), (8, 2), (2, 4))
COMMON = {
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 256,
    "vocab_size": 1000,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}
OWN: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"model_type": "llama"},
    "Qwen2ForCausalLM": {"model_type": "qwen2", "tie_word_embeddings": True},
    "Qwen3ForCausalLM": {"model_type": "qwen3", "tie_word_embeddings": True},
    "OPTForCausalLM": {
        "model_type": "opt",
        "ffn_dim": 256,
        "word_embed_proj_dim": 256,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "MixtralForCausalLM": {"model_type": "mixtral", "num_local_experts": 8},
    "Qwen3MoeForCausalLM": {
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 256,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    },
}
WEIGHTS: dict[str, dict[str, Any]] = {
    "int8": {"num_bits": 8, "type": "int", "strategy": "channel"},
    "fp8": {"num_bits": 8, "type": "float", "strategy": "tensor"},
    "int4": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP},
}
FORMATS = {"int8": "int-quantized", "fp8": "float-quantized", "int4": "pack-quantized"}


def quantisation(precision: str) -> dict[str, Any]:
    weights = WEIGHTS[precision] | {"symmetric": True, "dynamic": False}
    inputs = None
    if precision != "int4":
        strategy = {"int8": "token", "fp8": "tensor"}[precision]
        inputs = weights | {"strategy": strategy, "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": FORMATS[precision],
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*gate$"],
    }


def configured(architecture: str, precision: str, folder: Path) -> tuple[ModelFacts, Any]:
    config = COMMON | OWN[architecture] | {"architectures": [architecture]}
    facts = model_from_config(config, name=architecture, place=str(folder))
    if precision != "bf16":
        config["quantization_config"] = quantisation(precision)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    model = ModelConfig(
        model=str(folder), tokenizer=str(folder), skip_tokenizer_init=True, dtype="bfloat16"
    )
    return facts, VllmConfig(
        model_config=model,
        device_config=DeviceConfig(device="cpu"),
        cache_config=CacheConfig(block_size=128),
    )


def built(config: Any, layout: Layout, rank: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a rank's parameters, on the meta device."""
    stage, tensor_rank = divmod(rank, layout.tensor_parallel_size)
    tensor, pipeline = parallel_state.get_tp_group(), parallel_state.get_pp_group()
    tensor.world_size, tensor.rank_in_group = layout.tensor_parallel_size, tensor_rank
    pipeline.world_size, pipeline.rank_in_group = layout.pipeline_parallel_size, stage
    pipeline.ranks, pipeline.rank = list(range(layout.pipeline_parallel_size)), stage
    config.parallel_config.tensor_parallel_size = layout.tensor_parallel_size
    config.parallel_config.pipeline_parallel_size = layout.pipeline_parallel_size
    kind, _ = ModelRegistry.resolve_model_cls(
        config.model_config.architectures, model_config=config.model_config
    )
    with (
        set_current_vllm_config(config),
        torch.device("meta"),
        set_default_torch_dtype(torch.bfloat16),
    ):
        model = kind(vllm_config=config)
    return {name: tuple(value.shape) for name, value in model.named_parameters()}


def main(asked: list[str]) -> None:
    with tempfile.TemporaryDirectory() as store:
        parallel_state.init_distributed_environment(
            world_size=1,
            rank=0,
            local_rank=0,
            distributed_init_method=f"file://{store}/store",
            backend="gloo",
        )
        with set_current_vllm_config(VllmConfig(device_config=DeviceConfig(device="cpu"))):
            parallel_state.initialize_model_parallel(1, 1)
        for one in asked:
            architecture, _, precisions = one.partition("=")
            for precision in precisions.split(","):
                compare(architecture, precision, Path(store) / f"{architecture}-{precision}")


def compare(architecture: str, precision: str, folder: Path) -> None:
    folder.mkdir()
    held = WeightFormat(precision=Precision(precision), group_size=GROUP)
    for width, depth in SIZES:
        layout = Layout(tensor_parallel_size=width, pipeline_parallel_size=depth, held=held)
        for rank in sorted({0, width * depth // 2, width * depth - 1}):
            facts, config = configured(architecture, precision, folder)
            live = built(config, layout, rank)
            expected = shard_map(architecture_of(facts, architecture), layout, rank)
            found = differences(expected, live)
            print(architecture, precision, width, depth, rank, len(live), *found, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
