"""What is known of well-known models, row by row: counted, allocated or published by others.

Parameters within 3 %, KV cache within 5 %. Bytes of KV cache are per token, in bf16 on one rank:
of an endless request where no length is given, in which windows and states vanish.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from oserve.core import OServeError, Precision, ReplicaShape
from oserve.perf.cache_groups import cache_groups
from oserve.perf.layers import CacheKind, LayerKind
from oserve.perf.memory import weights_bytes
from oserve.perf.model import ModelFacts
from oserve.perf.model_config import model_from_config

CONFIGS: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parent / "models/configs.json").read_text()
)
ENDLESS = 1 << 30


def facts_of(name: str) -> ModelFacts:
    return model_from_config(CONFIGS[name], name=name, place=name)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("nemotron-3-nano", 31.58),
        ("nemotron-3-super", 120.7),
        ("nemotron-h-56b", 56.3),
        ("ernie-4.5-21b", 21.83),
        ("llama-4-maverick", 400.7),
        ("llama-4-scout", 107.8),
        ("gemma-2-2b", 2.61),
        ("gemma-2-9b", 9.24),
        ("gemma-2b", 2.51),
        ("aya-8b", 8.03),
        ("gemma-3-1b", 1.00),
        ("command-r", 34.98),
        ("starcoder2-7b", 7.17),
        ("arcee-defaults", 4.02),
        ("apertus-defaults", 6.98),
        ("persimmon-8b", 9.40),
        ("qwen3-vl-2b", 2.13),
        ("step-3.7-flash", 197.8),
        ("lfm2-defaults", 2.71),
    ],
)
def test_parameters(name: str, billions: float) -> None:
    assert facts_of(name).parameters / 1e9 == pytest.approx(billions, rel=0.03)


def test_the_language_model_of_a_multimodal_one() -> None:
    facts = facts_of("step-3.7-flash")
    assert (facts.parameters - facts.extra_parameters) / 1e9 == pytest.approx(195.8, rel=0.03)


@pytest.mark.parametrize(
    ("name", "tokens", "size"),
    [
        ("nemotron-3-nano", ENDLESS, 6144),
        ("nemotron-h-56b", ENDLESS, 40_960),
        ("starcoderbase-1b", ENDLESS, 12_288),
        ("gemma-3-27b", 640, 598_018),
        ("gemma-3-27b", 8192, 268_161),
        ("gemma-4-31b", 8192, 392_320),
        ("gpt-oss-20b", 8192, 31_200),
        ("mimo-v2-flash", 8192, 84_690),
    ],
)
def test_kv_cache(name: str, tokens: int, size: int) -> None:
    groups = cache_groups(facts_of(name).layer_kinds, value_bytes=2)
    assert groups.request_bytes(tokens, 2048) / tokens == pytest.approx(size, rel=0.05)


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("phi-3.5-mini", 4096),
        ("phi-4-mini", 4096),
        ("llama-linear-x8", 32_768),
        ("command-r", 131_072),
    ],
)
def test_contexts(name: str, tokens: int) -> None:
    assert facts_of(name).max_model_len == tokens


def test_experts_of_a_token() -> None:
    assert facts_of("gemma-4-26b-a4b").experts_per_token == 8


def test_weights_of_quantised_checkpoints() -> None:
    shape = ReplicaShape(
        precision=Precision.BF16, max_num_batched_tokens=2048, max_num_seqs=64, device_kind="H100"
    )
    assert weights_bytes(facts_of("gpt-oss-120b"), shape) == pytest.approx(65e9, rel=0.03)
    assert weights_bytes(facts_of("qwen3-235b-fp8"), shape) == pytest.approx(236e9, rel=0.03)


@pytest.mark.parametrize(
    "name",
    [
        *("deepseek-v2-lite", "deepseek-r1", "kimi-k2", "minicpm3-4b", "qwen3-next-80b"),
        *("qwen3.5-35b-a3b", "qwen3.5-9b", "jamba-1.5-mini", "granite-4-h-small", "falcon-h1-7b"),
        *("zamba2-2.7b", "falcon-7b", "falcon-40b", "gpt2-xl", "chatglm3-6b", "gemma-3-4b"),
        *("qwen3-coder-480b", "nemotron-super-like"),
    ],
)
def test_vllm_builds_them_and_they_are_read(name: str) -> None:
    assert facts_of(name).parameters > 0


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["SomethingNewForCausalLM"], "model_type": "llama"},
        {"architectures": ["BertModel"], "model_type": "bert"},
        {"architectures": ["Qwen3ForSequenceClassification"], "model_type": "qwen3"},
    ],
)
def test_what_nothing_serves_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(OServeError, match="vLLM"):
        model_from_config({**CONFIGS["qwen3-8b"], **config}, name="odd", place="config")


def test_each_block_of_a_searched_model_has_sizes_of_its_own() -> None:
    """Of Nemotron-NAS: blocks without attention, with 8 or 4 heads, and MLPs of several widths."""
    facts = facts_of("nemotron-super-like")
    assert facts.layers == 12

    def count(kind: LayerKind) -> int:
        return kind.count

    cached = [kind for kind in facts.layer_kinds if kind.cache.kind is CacheKind.FULL]
    assert sum(map(count, cached)) == 8
    assert {kind.cache.heads for kind in cached} == {8, 4}
    assert len({kind.dense_width for kind in facts.layer_kinds}) == 6
    without = dict(CONFIGS["nemotron-super-like"])
    del without["num_hidden_layers"]
    assert model_from_config(without, name="n", place="n").layers == 12
    del without["block_configs"]
    with pytest.raises(OServeError, match="block_configs"):
        model_from_config(without, name="n", place="n")


@pytest.mark.parametrize("part", ["attention", "ffn"])
def test_a_block_of_another_kind_is_refused(part: str) -> None:
    config = dict(CONFIGS["nemotron-super-like"])
    first = {**config["block_configs"][0], part: {"no_op": False, "replace_with_linear": True}}
    config["block_configs"] = [first, *config["block_configs"][1:]]
    with pytest.raises(OServeError, match="not known") as caught:
        model_from_config(config, name="n", place="n")
    assert "block_configs" in caught.value.place
