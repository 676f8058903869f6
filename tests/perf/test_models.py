"""Facts of some hundred configurations against the counts of transformers and vLLM.

``models/configs.json``: minimal configurations, whose values are those of published models.
``models/truth.json``: parameters as transformers' classes count them on the meta device, and KV
bytes as vLLM's cache specs give them; ``by`` says which. ``benchmarks/perf/models.py`` writes it.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from oserve.core import OServeError, Precision, ReplicaShape
from oserve.perf.cache_groups import cache_groups
from oserve.perf.config_keys import ConfigKeys
from oserve.perf.memory import kv_bytes_per_token, memory_fit, weights_bytes
from oserve.perf.model import ModelFacts
from oserve.perf.model_config import model_from_config, read_model
from oserve.perf.roofline import Roofline
from oserve.perf.source import RooflineSource

FOLDER = Path(__file__).parent / "models"
CONFIGS: dict[str, dict[str, Any]] = json.loads((FOLDER / "configs.json").read_text())
TRUTH: dict[str, dict[str, Any]] = json.loads((FOLDER / "truth.json").read_text())
COUNTED = [name for name, row in TRUTH.items() if "parameters" in row]
CACHED = [name for name, row in TRUTH.items() if "kv_bytes" in row]


def facts_of(name: str) -> ModelFacts:
    return model_from_config(CONFIGS[name], name=name, place=name)


@pytest.mark.parametrize("name", COUNTED)
def test_parameters_are_those_that_the_class_has(name: str) -> None:
    assert facts_of(name).parameters == pytest.approx(TRUTH[name]["parameters"], rel=0.03)


@pytest.mark.parametrize("name", CACHED)
def test_the_cache_is_as_large_as_vllm_allocates(name: str) -> None:
    groups = cache_groups(facts_of(name).layer_kinds, value_bytes=2)
    for tokens, size in TRUTH[name]["kv_bytes"].items():
        found = groups.request_bytes(int(tokens), 2048) / int(tokens)
        assert found == pytest.approx(size, rel=0.05)


@pytest.mark.parametrize("name", [name for name in TRUTH if "max_model_len" in TRUTH[name]])
def test_the_context_is_as_vllm_derives_it(name: str) -> None:
    assert facts_of(name).max_model_len == TRUTH[name]["max_model_len"]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_gives_sound_facts(name: str) -> None:
    facts = facts_of(name)
    assert 0 < facts.active_parameters <= facts.parameters
    shape = ReplicaShape(
        precision=Precision.BF16,
        tensor_parallel_size=2,
        max_num_batched_tokens=2048,
        max_num_seqs=64,
        device_kind="H100",
    )
    fit = memory_fit(facts, shape, 4e12)
    assert fit.kv_tokens > 0
    # A longer request never takes less.
    sizes = [round(tokens * kv_bytes_per_token(facts, shape, tokens)) for tokens in (16, 900, 9000)]
    assert sizes == sorted(sizes)
    step = RooflineSource(facts).step_model(shape)
    assert isinstance(step, Roofline)
    assert 0 < step.step_s(0, 0, 1, 100) <= step.step_s(512, 512 * 256, 1, 100)


def test_a_quantised_checkpoint_counts_as_it_is_stored() -> None:
    shape = ReplicaShape(max_num_batched_tokens=2048, max_num_seqs=64, device_kind="H100")
    assert weights_bytes(facts_of("gpt-oss-120b"), shape) == pytest.approx(65e9, rel=0.03)
    assert weights_bytes(facts_of("qwen3-235b-fp8"), shape) == pytest.approx(236e9, rel=0.03)


def test_states_do_not_grow_with_the_request() -> None:
    groups = cache_groups(facts_of("nemotron-3-nano").layer_kinds, value_bytes=2)
    grown = groups.request_bytes(200_000) - groups.request_bytes(100_000)
    assert grown / 100_000 == pytest.approx(6144, rel=0.02)


def test_a_latent_is_whole_on_every_rank() -> None:
    facts = facts_of("deepseek-r1")
    one, eight = (
        cache_groups(facts.layer_kinds, value_bytes=2, tensor_parallel_size=tp).request_bytes(4096)
        for tp in (1, 8)
    )
    assert one == eight == 61 * 576 * 2 * 4096


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"architectures": ["MadeUpForCausalLM"]}, "does not support"),
        ({"architectures": ["BertModel"], "model_type": "bert"}, "pooling"),
        ({"architectures": ["BaichuanForCausalLM"]}, "until 0.23.0"),
        ({"architectures": ["EagleLlamaForCausalLM"]}, "draft"),
        ({"model_type": None}, "no model_type"),
    ],
)
def test_what_vllm_does_not_serve_is_refused_with_its_reason(
    config: dict[str, Any], reason: str
) -> None:
    with pytest.raises(OServeError, match=reason) as caught:
        model_from_config(CONFIGS["llama-3.1-8b"] | config, name="odd", place="config")
    assert caught.value.remedy


def test_a_folder_with_a_pooling_module_is_an_embedding_model(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(CONFIGS["qwen3-8b"]))
    assert read_model(file).read_by
    module = {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}
    (tmp_path / "modules.json").write_text(json.dumps([module]))
    with pytest.raises(OServeError, match="pooling"):
        read_model(file)


def test_an_absent_key_takes_the_default_of_its_class() -> None:
    """Gemma ties its head unless told otherwise; a nested model may leave out nearly all."""
    assert facts_of("gemma-2-9b").tied
    untied = CONFIGS["gemma-2-9b"] | {"tie_word_embeddings": False}
    assert not model_from_config(untied, name="g", place="g").tied
    assert ConfigKeys(CONFIGS["gemma-3-4b"], place="g").count("num_attention_heads") == 8
