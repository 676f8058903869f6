"""Weights as checkpoints store them, by ``quantization_config`` and by files.

``models/stored.json``: for configurations of ``configs.json``, some with another
``quantization_config``, the bytes of all parameters that vLLM's classes make on one rank, by
tensor-parallel size; ``benchmarks/perf/models_rank_weights.py`` writes them.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from oserve.core import OServeError, Precision, ReplicaShape
from oserve.perf.layers import Part
from oserve.perf.memory import weights_bytes
from oserve.perf.model import ModelFacts
from oserve.perf.model_config import model_from_config, read_model
from oserve.perf.weight_files import INDEX, weight_file_bytes

FOLDER = Path(__file__).parent / "models"
CONFIGS: dict[str, dict[str, Any]] = json.loads((FOLDER / "configs.json").read_text())
STORED: dict[str, dict[str, Any]] = json.loads((FOLDER / "stored.json").read_text())
RANKS = [(name, int(size)) for name, row in STORED.items() for size in row["rank_bytes"]]


def shape_of(tensor_parallel_size: int = 1, precision: Precision = Precision.BF16) -> ReplicaShape:
    return ReplicaShape(
        precision=precision,
        tensor_parallel_size=tensor_parallel_size,
        max_num_batched_tokens=2048,
        max_num_seqs=64,
        device_kind="H100",
    )


def config_of(name: str) -> dict[str, Any]:
    row = STORED[name]
    config = dict(CONFIGS[row["model"]])
    # Of multimodal models vLLM's classes of the language model were built.
    config = config["text_config"] if "architecture" in row else config
    if "quantization_config" in row:
        config = config | {"quantization_config": row["quantization_config"]}
    return config


def made_bytes(facts: ModelFacts, size: int) -> float:
    """Without the copies that vLLM makes once the weights are loaded."""
    held = sum(
        kind.count * one.parameters * 2 / min(one.shards, size)
        for kind in facts.layer_kinds
        for one in kind.matrices
        if one.part is Part.HELD
    )
    return weights_bytes(facts, shape_of(size)) - held


def stored(quantised: dict[str, Any], model: str = "qwen3-8b") -> ModelFacts:
    config = CONFIGS[model] | {"quantization_config": quantised}
    return model_from_config(config, name="q", place="q")


def bytes_of(facts: ModelFacts, part: Part) -> float:
    return facts.layer_kinds[0].mean_bytes(part, 2.0)


@pytest.mark.parametrize(("name", "size"), RANKS)
def test_a_rank_holds_as_many_bytes_as_vllms_classes_make(name: str, size: int) -> None:
    facts = model_from_config(config_of(name), name=name, place=name)
    truth = STORED[name]["rank_bytes"][str(size)]
    assert made_bytes(facts, size) == pytest.approx(truth, rel=0.03)


def test_every_row_says_how_it_was_obtained() -> None:
    assert all(row["by"] for row in STORED.values())


@pytest.mark.parametrize(
    ("quantised", "size"),
    [
        ({"quant_method": "modelopt", "quantization": {"quant_algo": "NVFP4"}}, 0.5625),
        ({"quantization": {"quant_algo": "FP8"}}, 1.0),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, 0.5625),
        ({"quant_method": "modelopt", "quant_algo": "MXFP8"}, 1.03125),
        ({"quant_method": "modelopt_mxfp8"}, 1.03125),
        ({"quant_method": "fp8"}, 1.0),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 1.0),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 0.5625),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, 1.0),
        ({"quant_method": "awq", "bits": 4, "group_size": 64}, 0.5 + 2.5 / 64),
    ],
)
def test_each_method_has_its_size(quantised: dict[str, Any], size: float) -> None:
    facts = stored(quantised)
    assert bytes_of(facts, Part.MIXER) == bytes_of(facts, Part.DENSE) == pytest.approx(size)


@pytest.mark.parametrize(
    "kept",
    [
        {"modules_to_not_convert": ["self_attn"]},
        {"ignored_layers": ["re:.*self_attn.*"]},
        {"ignore": ["model.layers.*.self_attn*"]},
        {"exclude_modules": [f"model.layers.{layer}.self_attn" for layer in range(36)]},
        {
            "modules_to_not_convert": [
                f"model.language_model.layers.{layer}.self_attn.{name}_proj"
                for layer in range(36)
                for name in "qkvo"
            ]
        },
    ],
)
def test_modules_that_are_named_stay_in_16_bits(kept: dict[str, Any]) -> None:
    facts = stored({"quant_method": "fp8", **kept})
    assert bytes_of(facts, Part.MIXER) == 2.0
    assert bytes_of(facts, Part.DENSE) == 1.0


def test_layers_that_are_stored_otherwise_count_apart() -> None:
    facts = stored({"quant_method": "fp8", "ignored_layers": ["model.layers.0", "model.layers.35"]})
    assert sorted(kind.count for kind in facts.layer_kinds) == [2, 34]
    whole = stored({"quant_method": "fp8"})
    kept = 2 * whole.plain_kind.parameters
    difference = weights_bytes(facts, shape_of()) - weights_bytes(whole, shape_of())
    assert difference == pytest.approx(kept)


def test_the_head_is_quantised_only_where_the_method_does_it() -> None:
    def head(quantised: dict[str, Any]) -> float:
        found = stored(quantised).stored
        assert found is not None
        return found.head_bytes

    assert head({"quant_method": "fp8"}) == 2.0
    assert head({"quant_method": "gptq", "bits": 4, "lm_head": True}) < 0.6
    assert head({"quant_method": "modelopt", "quant_algo": "FP8"}) == 1.0
    assert head({"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}) == 2.0
    weights = {"num_bits": 8, "type": "float", "strategy": "channel"}
    groups = {"g": {"targets": ["Linear", "lm_head"], "weights": weights}}
    assert head({"quant_method": "compressed-tensors", "config_groups": groups}) == 1.0


def test_a_tower_is_quantised_unless_it_is_named() -> None:
    def outside(quantised: dict[str, Any]) -> float:
        found = stored(quantised, "gemma-3-27b").stored
        assert found is not None
        return found.outside_bytes

    assert outside({"quant_method": "fp8"}) == 1.0
    assert outside({"quant_method": "fp8", "ignored_layers": ["vision_tower"]}) == 2.0
    assert outside({"quant_method": "modelopt", "quant_algo": "FP8"}) == 2.0


def test_a_towers_layers_are_not_those_of_the_language_model() -> None:
    name = "vision_tower.vision_model.encoder.layers.0"
    facts = stored({"quant_method": "fp8", "ignored_layers": [name]}, "gemma-3-27b")
    assert all(kind.mean_bytes(Part.MIXER, 2.0) == 1.0 for kind in facts.layer_kinds)


def test_another_precision_is_a_copy_of_the_whole_model() -> None:
    facts, plain = (
        stored({"quant_method": "fp8", "ignored_layers": ["self_attn"]}),
        stored({"quant_method": "fp8"}),
    )
    for precision in (Precision.FP32, Precision.FP8, Precision.INT4):
        shape = shape_of(precision=precision)
        assert weights_bytes(facts, shape) == weights_bytes(plain, shape)


def test_a_bad_expression_is_refused_where_it_stands() -> None:
    with pytest.raises(OServeError, match="regular expression") as caught:
        stored({"quant_method": "fp8", "ignored_layers": ["re:("]})
    assert "quantization_config" in caught.value.place


def test_latent_attention_holds_a_projection_twice() -> None:
    """vLLM keeps it as loaded for prompts, and two parts of it in 16 bits for decoding."""
    facts = model_from_config(CONFIGS["deepseek-r1"], name="r1", place="r1")
    difference = weights_bytes(facts, shape_of(8)) - made_bytes(facts, 8)
    assert difference == 61 * 512 * 128 * 256 * 2 / 8


def write_weights(file: Path, tensors: dict[str, tuple[str, int]]) -> None:
    """A safetensors file of zeros: type and bytes by name."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (kind, size) in tensors.items():
        header[name] = {"dtype": kind, "shape": [size], "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))


def write_index(folder: Path, names: dict[str, str], total: object) -> None:
    index = {"metadata": {"total_size": total}, "weight_map": names}
    (folder / INDEX).write_text(json.dumps(index))


def test_files_are_added_up_in_the_engines_type(tmp_path: Path) -> None:
    write_weights(
        tmp_path / "a.safetensors",
        {
            "model.layers.0.mlp.up_proj.weight": ("F32", 400),
            "model.layers.1.mlp.up_proj.weight": ("F8_E4M3", 100),
            "model.layers.1.mlp.up_proj.weight_scale_inv": ("F32", 8),
            # For multi-token prediction, which vLLM does not load.
            "model.layers.2.mlp.up_proj.weight": ("F8_E4M3", 1000),
            "mtp.fc.weight": ("BF16", 1000),
            "vision_tower.encoder.layers.7.mlp.fc1.weight": ("BF16", 50),
        },
    )
    write_weights(tmp_path / "b.safetensors", {"lm_head.weight": ("BF16", 60)})
    write_index(tmp_path, {"x": "a.safetensors", "lm_head.weight": "b.safetensors"}, 1)
    assert weight_file_bytes(tmp_path, 2) == 200 + 100 + 8 + 50 + 60
    (tmp_path / "b.safetensors").unlink()
    # Without all files, the index is believed.
    assert weight_file_bytes(tmp_path, 2) == 1
    assert weight_file_bytes(tmp_path, 2, wide=True) == 0


@pytest.mark.parametrize("total", [None, "10", -1, float("inf")])
def test_an_index_without_a_total_says_nothing(tmp_path: Path, total: object) -> None:
    write_index(tmp_path, {"lm_head.weight": "b.safetensors"}, total)
    assert weight_file_bytes(tmp_path, 2) == 0


def test_the_total_of_an_index_with_further_layers_is_not_the_models(tmp_path: Path) -> None:
    write_index(tmp_path, {"model.layers.2.x": "b.safetensors"}, 1000)
    assert weight_file_bytes(tmp_path, 2) == 0
    assert weight_file_bytes(tmp_path, 3) == 1000


def test_a_file_that_is_cut_off_says_nothing(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    write_weights(file, {"lm_head.weight": ("BF16", 60)})
    assert weight_file_bytes(tmp_path, 2) == 60
    file.write_bytes(file.read_bytes()[:-1])
    assert weight_file_bytes(tmp_path, 2) == 0


def test_files_correct_the_whole_of_a_model_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["qwen3-8b"]))
    without = read_model(tmp_path / "config.json")
    write_index(tmp_path, {"lm_head.weight": "b.safetensors"}, 18_000_000_000)
    facts = read_model(tmp_path / "config.json")
    assert facts == without
    assert weights_bytes(facts, shape_of()) == pytest.approx(18e9)
    fp8 = shape_of(precision=Precision.FP8)
    assert weights_bytes(facts, fp8) == weights_bytes(without, fp8)


def test_modelopts_own_file_beside_the_configuration_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["qwen3-8b"]))
    beside = {"quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(beside))
    assert bytes_of(read_model(tmp_path / "config.json"), Part.MIXER) == 1.0
