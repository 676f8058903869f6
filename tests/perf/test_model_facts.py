"""Model and device facts: the catalogue, config.json, and what is refused."""

import json
from pathlib import Path

import pytest

from oserve.core import OServeError, Precision
from oserve.perf.catalogue import catalogue
from oserve.perf.coefficients import find_coefficients
from oserve.perf.device import find_device, find_link
from oserve.perf.known_models import find_model
from oserve.perf.model_config import model_from_config

# Published parameter counts, in billions.
SIZES = {
    "opt-30b": 30.0,
    "opt-66b": 66.0,
    "llama-30b": 32.5,
    "llama-2-70b": 69.0,
    "llama-3.1-8b": 8.0,
    "llama-3.1-70b": 70.6,
    "qwen3-0.6b": 0.6,
    "qwen3-8b": 8.2,
    "qwen3-32b": 32.8,
    "mixtral-8x7b": 46.7,
}


@pytest.mark.parametrize(("name", "billions"), SIZES.items())
def test_catalogue_models_have_their_published_size(name: str, billions: float) -> None:
    assert find_model(name).parameters / 1e9 == pytest.approx(billions, rel=0.03)


def test_every_catalogue_model_is_found_by_each_of_its_names() -> None:
    for key, row in catalogue("models").items():
        for alias in [key, key.upper(), *row["aliases"]]:
            assert find_model(alias).name == key


def test_a_mixture_of_experts_has_fewer_active_parameters() -> None:
    facts = find_model("mixtral-8x7b")
    assert facts.active_parameters / 1e9 == pytest.approx(12.9, rel=0.02)
    dense = find_model("llama-3.1-8b")
    assert dense.active_parameters == dense.parameters


def test_a_config_gives_the_same_facts_as_the_catalogue(tmp_path: Path) -> None:
    config = {
        "model_type": "llama",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
        "max_position_embeddings": 131072,
    }
    folder = tmp_path / "llama-3.1-8b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    assert find_model(str(folder)) == find_model("llama-3.1-8b")


def test_opt_and_mixture_configs() -> None:
    opt = model_from_config(
        {
            "model_type": "opt",
            "hidden_size": 9216,
            "num_hidden_layers": 64,
            "num_attention_heads": 72,
            "ffn_dim": 36864,
            "vocab_size": 50272,
            "max_position_embeddings": 2048,
        },
        name="opt-66b",
        place="config",
    )
    assert opt == find_model("opt-66b")
    moe = model_from_config(
        {
            "model_type": "qwen3_moe",
            "hidden_size": 2048,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "vocab_size": 151936,
        },
        name="qwen3-30b-a3b",
        place="config",
    )
    assert moe.parameters / 1e9 == pytest.approx(30.5, rel=0.02)
    assert moe.active_parameters / 1e9 == pytest.approx(3.3, rel=0.05)


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"hidden_size": 0}, "config:hidden_size"),
        ({"num_hidden_layers": -3}, "config:num_hidden_layers"),
        ({"vocab_size": "many"}, "config:vocab_size"),
        ({"model_type": None}, "config:model_type"),
        ({"architectures": ["BertModel"]}, "config:architectures"),
    ],
)
def test_a_senseless_config_is_refused_by_field(change: dict[str, object], place: str) -> None:
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "vocab_size": 100,
    }
    with pytest.raises(OServeError) as caught:
        model_from_config({**config, **change}, name="odd", place="config")
    assert caught.value.place == place


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(OServeError, match="nothing is known") as caught:
        find_model("llama-2-70")
    assert "did you mean llama-2-70b?" in caught.value.remedy
    with pytest.raises(OServeError) as caught:
        find_device("H10")
    assert "H100" in caught.value.remedy
    with pytest.raises(OServeError):
        find_link("string and tin cans")


def test_every_device_has_sound_facts_and_coefficients() -> None:
    for kind, row in catalogue("devices").items():
        device = find_device(kind)
        assert device.source
        power = device.power
        assert 0 < power.idle_w <= power.context_w < power.decode_1_w
        assert power.decode_1_w < power.decode_128_w <= power.max_w
        assert power.source
        assert device.bandwidth > 0
        assert device.link.bandwidth > 0
        for precision in Precision:
            assert device.peak_flops(precision) > 0
            assert find_coefficients(kind, precision).origin
        for alias in row["aliases"]:
            assert find_device(alias) == device


def test_borrowed_coefficients_say_so() -> None:
    assert find_coefficients("H100", Precision.BF16).fitted
    assert find_coefficients("H100", Precision.FP8).fitted
    borrowed = find_coefficients("MI300X", Precision.BF16)
    assert not borrowed.fitted
    assert "borrowed" in borrowed.origin
    # Without fp8 units the weights are widened, so bf16 products count.
    assert "bf16" in find_coefficients("A100", Precision.FP8).origin
