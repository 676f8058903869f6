"""Facts of some hundred configurations against the counts of transformers and vLLM.

``models/configs.json``: minimal configurations, whose values are those of published models.
``models/truth.json``: parameters as transformers' classes count them on the meta device; for some,
KV bytes by vLLM's cache specs; contexts as vLLM derives them. Each has its ``by``.
``benchmarks/perf/models.py`` and ``models_by_vllm.py`` write it.
"""

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from oserve import perf
from oserve.core import OServeError, Precision, ReplicaShape
from oserve.perf.cache_groups import cache_groups
from oserve.perf.checked import CHECKED, KEYS, OUTER_TYPES, TEXT_TYPES
from oserve.perf.config_keys import ConfigKeys, checked_types
from oserve.perf.device import find_device
from oserve.perf.memory import kv_bytes_per_token, memory_fit, weights_bytes
from oserve.perf.model import ModelFacts
from oserve.perf.model_config import model_from_config, read_model
from oserve.perf.roofline import Roofline
from oserve.perf.serveable import BY_TABLE, BY_VALUES
from oserve.perf.shapes import splits
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
    fit = memory_fit(facts, shape, find_device("H100").memory_bytes)
    # The weights are those of the parameters, and the cache has the rest.
    stored = weights_bytes(facts, shape) * 2
    assert 0.25 * facts.parameters < stored <= 2.2 * facts.parameters
    taken = fit.weights_bytes + fit.reserve_bytes + fit.kv_tokens * fit.kv_bytes_per_token
    assert (fit.kv_tokens > 0) == (fit.missing_bytes == 0)
    assert taken <= fit.usable_bytes or fit.missing_bytes
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


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        # Attention beside a state space, or in a block that layers share.
        ("falcon-h1-7b", {1, 2, 4}),
        ("zamba2-2.7b", {1, 2, 4, 8, 16}),
        # Attention in layers of their own; states in 8 groups, or with heads.
        ("nemotron-3-nano", {1, 2, 4, 8}),
        ("jamba-1.5-mini", {1, 2, 4, 8, 16, 32}),
        ("qwen3-next-80b", {1, 2, 4, 8, 16}),
        ("lfm2-2.6b", {1, 2, 4, 8, 16, 32}),
        # States alone.
        ("falcon-mamba-7b", {1, 2, 4, 8, 16, 32}),
        ("codestral-mamba-7b", {1, 2, 4, 8}),
        # A latent is whole on each rank.
        ("deepseek-v2-lite", {1, 2, 4, 8, 16}),
    ],
)
def test_tensor_parallelism_divides_heads_states_and_mlps(name: str, sizes: set[int]) -> None:
    facts = facts_of(name)
    assert {size for size in (1, 2, 3, 4, 8, 16, 32) if splits(facts, size)} == sizes


def test_no_rank_holds_a_part_of_a_block_of_scales() -> None:
    """Experts' blocks are divided down to 32, as their width of 1,536 shows; dense ones are not."""
    experts = facts_of("qwen3-235b-fp8")
    sizes = (1, 2, 4, 8, 16, 32, 64)
    assert [size for size in sizes if splits(experts, size)] == [1, 2, 4, 8, 16]
    stored = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    dense = CONFIGS["qwen3-8b"] | {"intermediate_size": 1536, "quantization_config": stored}
    facts = model_from_config(dense, name="q", place="q")
    assert [size for size in sizes if splits(facts, size)] == [1, 2, 4]
    weights = {"num_bits": 8, "strategy": "block", "block_structure": [128, 128]}
    other = {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"weights": weights}},
    }
    strict = CONFIGS["qwen3-235b-fp8"] | {"quantization_config": other}
    facts = model_from_config(strict, name="q", place="q")
    assert [size for size in sizes if splits(facts, size)] == [1, 2, 4]


@pytest.mark.parametrize(
    "stored",
    [
        {"quant_method": "quark"},
        {"quant_method": "torchao"},
        {"quant_method": "hqq"},
        {"quant_method": "modelopt_mixed"},
        {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": 1}},
        {"quant_method": "compressed-tensors"},
        {"quant_method": "gptq", "bits": 40},
        {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"},
        {"quant_method": "modelopt"},
        {},
    ],
)
def test_unknown_quantisation_is_refused_with_a_remedy_that_works(stored: dict[str, Any]) -> None:
    config = CONFIGS["qwen3-8b"] | {"quantization_config": stored}
    with pytest.raises(OServeError, match="not known") as caught:
        model_from_config(config, name="q", place="q")
    assert "config.json of the unquantised model" in caught.value.remedy


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


def types_in(config: dict[str, Any]) -> set[str]:
    """The types of a configuration and of the language model in it."""
    return {str(config["model_type"]), ConfigKeys(config, place="config").kind}


def test_every_truth_says_how_it_was_obtained() -> None:
    for row in TRUTH.values():
        for value, by in (("parameters", "by"), ("kv_bytes", "kv_by")):
            assert (value in row) == (by in row)
        assert ("max_model_len" in row) == ("max_model_len_by" in row)


def test_every_checked_type_was_compared_with_a_count() -> None:
    compared = set().union(*(types_in(CONFIGS[name]) for name in COUNTED))
    assert compared == CHECKED
    assert TEXT_TYPES | OUTER_TYPES == CHECKED


@pytest.mark.parametrize(
    "kind",
    [
        "deepseek_v4",
        "longcat_flash",
        "longcat_flash_ngram",
        "minicpm",
        "olmo_hybrid",
        "qwen3_omni_moe",
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_families_that_would_be_misread_are_refused_by_name(kind: str, nested: bool) -> None:
    config = {**CONFIGS["llama-3.1-8b"], "model_type": kind}
    if nested:
        config = {"model_type": "llava", "text_config": config}
    config.pop("architectures", None)
    with pytest.raises(OServeError, match=f"{kind} are not sized yet") as caught:
        model_from_config(config, name="odd", place="config")
    assert "--plan" in caught.value.remedy


def test_a_language_model_of_an_unknown_type_is_not_read_by_the_rules_of_llama(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As where transformers, which takes seconds to load, is not installed.
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    inner = CONFIGS["llava-1.5-7b"]["text_config"] | {"model_type": "madeup"}
    with pytest.raises(OServeError, match="madeup") as caught:
        model_from_config(
            CONFIGS["llava-1.5-7b"] | {"text_config": inner}, name="odd", place="config"
        )
    assert "oserve[models]" in caught.value.remedy


def test_it_is_said_where_no_defaults_of_the_class_are_known() -> None:
    assert facts_of("chatglm3-6b").read_by == BY_VALUES
    assert facts_of("kimi-k2").read_by == facts_of("llava-1.5-7b").read_by == BY_TABLE


def test_the_shipped_defaults_are_those_of_checked_types() -> None:
    assert set(checked_types()) <= CHECKED


READERS = {"value", "count", "optional", "natural", "flag", "list"}


def keys_read(source: str) -> set[str]:
    """The strings that a module passes to ``ConfigKeys``, directly or through a name."""
    tree = ast.parse(source)
    given: dict[str, set[str]] = {}
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets, value = node.targets, node.value
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            targets, value = [node.target], node.value
        elif isinstance(node, ast.For | ast.comprehension):
            targets, value = [node.target], node.iter
        for target in targets:
            if isinstance(target, ast.Name):
                given.setdefault(target.id, set()).update(strings(value))
                if isinstance(value, ast.Name):
                    given[target.id] |= given.get(value.id, set())
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        of = node.func.value
        if node.func.attr in READERS and isinstance(of, ast.Name) and of.id == "keys":
            for argument in node.args:
                inner = argument.value if isinstance(argument, ast.Starred) else argument
                found |= given[inner.id] if isinstance(inner, ast.Name) else strings(inner)
    return found


def strings(node: ast.expr) -> set[str]:
    inner = node.elts if isinstance(node, ast.Tuple) else [node]
    return {
        one.value for one in inner if isinstance(one, ast.Constant) and isinstance(one.value, str)
    }


def test_the_listed_keys_are_those_that_are_read() -> None:
    """Of others the defaults would not be shipped."""
    folder = Path(perf.__file__).parent
    read = set().union(*(keys_read(file.read_text()) for file in folder.glob("*.py")))
    # Whether the head is the embedding depends on where it is mentioned: ``ConfigKeys.tied``.
    assert read | {"tie_word_embeddings"} == KEYS


def test_a_multimodal_file_may_give_the_language_models_values_itself() -> None:
    nested = CONFIGS["qwen2.5-vl-7b"]
    flat = {**nested, **nested["text_config"], "model_type": nested["model_type"]}
    del flat["text_config"]
    assert model_from_config(flat, name="q", place="q") == model_from_config(
        nested, name="q", place="q"
    )


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
