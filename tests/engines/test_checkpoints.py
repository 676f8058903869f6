"""Checkpoints: GGUF unpacked, int8 copies made, files whole or not there."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter, dequantize, quantize
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tokenizers import Tokenizer

from oserve.core import OServeError
from oserve.engines.checkpoints.folder import once, write_json
from oserve.engines.checkpoints.ggml import GgufModel, paired, unpaired
from oserve.engines.checkpoints.int8 import make_int8_variant, scales
from oserve.engines.checkpoints.smollm2 import make_smollm2
from oserve.engines.checkpoints.tensors import read_tensors, tensor, write_tensors
from oserve.perf.known_models import find_model

HIDDEN, WIDE, HEADS, KV_HEADS, LAYERS = 64, 96, 4, 2, 2
# Enough for the text that is tokenised below.
TOKENS = ["<|end|>", "<|start|>", "a", "b", "c", "Ġ", "1", "2", "ab", "Ġc"]
MERGES = ["a b", "Ġ c"]

Array = NDArray[np.float32]


def plain_tensors(seed: int = 0) -> dict[str, Array]:
    """A small Llama as Hugging Face names it."""
    source = np.random.default_rng(seed)

    def normal(*shape: int) -> Array:
        return source.standard_normal(shape, dtype=np.float32)

    found = {
        "model.embed_tokens.weight": normal(len(TOKENS), HIDDEN),
        "model.norm.weight": normal(HIDDEN),
    }
    rows = KV_HEADS * HIDDEN // HEADS
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for name, shape in {
            "self_attn.q_proj": (HIDDEN, HIDDEN),
            "self_attn.k_proj": (rows, HIDDEN),
            "self_attn.v_proj": (rows, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HIDDEN),
            "mlp.gate_proj": (WIDE, HIDDEN),
            "mlp.up_proj": (WIDE, HIDDEN),
            "mlp.down_proj": (HIDDEN, WIDE),
            "input_layernorm": (HIDDEN,),
            "post_attention_layernorm": (HIDDEN,),
        }.items():
            found[f"{prefix}{name}.weight"] = normal(*shape)
    return found


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.layers.": "blk.",
}


def write_gguf(
    path: Path,
    tensors: dict[str, Array],
    *,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    architecture: str = "llama",
    pre: str = "smollm",
) -> Path:
    """As llama.cpp's converter does: names, rows of q and k in pairs, matrices in blocks."""
    writer = GGUFWriter(str(path), architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(WIDE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3] + [1] * (len(TOKENS) - 2))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for name, values in tensors.items():
        own, stored = name, values
        for long, short in GGUF_NAMES.items():
            own = own.replace(long, short)
        if ".q_proj" in name:
            stored = paired(values, HEADS)
        elif ".k_proj" in name:
            stored = paired(values, KV_HEADS)
        if stored.ndim == 1:
            writer.add_tensor(own, stored)
        else:
            writer.add_tensor(own, quantize(stored, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@given(
    heads=st.integers(1, 6), half=st.integers(1, 8), inputs=st.integers(1, 5), seed=st.integers(0)
)
def test_rows_in_pairs_are_put_back(heads: int, half: int, inputs: int, seed: int) -> None:
    weight = np.random.default_rng(seed).random((heads * 2 * half, inputs), dtype=np.float32)
    stored = paired(weight, heads)
    assert np.array_equal(unpaired(stored, heads), weight)
    # What rotates together lies side by side: row i of a head and row i of its other half.
    first = stored.reshape(heads, half, 2, inputs)
    assert np.array_equal(first[:, :, 0], weight.reshape(heads, 2, half, inputs)[:, 0])
    assert np.array_equal(first[:, :, 1], weight.reshape(heads, 2, half, inputs)[:, 1])


@pytest.mark.parametrize(
    "kind", [GGMLQuantizationType.F32, GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0]
)
def test_weights_come_back_under_their_names(tmp_path: Path, kind: GGMLQuantizationType) -> None:
    wanted = plain_tensors()
    found = GgufModel(write_gguf(tmp_path / "m.gguf", wanted, kind=kind)).tensors()
    assert set(found) == set(wanted)
    for name, values in wanted.items():
        expected = values if values.ndim == 1 else dequantize(quantize(values, kind), kind)
        assert found[name].shape == values.shape
        # Blocks lie within rows, so that moving rows about changes no value.
        assert np.array_equal(found[name].make(), expected.reshape(values.shape)), name


def test_a_folder_that_engines_read(tmp_path: Path) -> None:
    tensors = plain_tensors()
    GgufModel(write_gguf(tmp_path / "m.gguf", tensors)).write(tmp_path)
    facts = find_model(str(tmp_path))
    assert (facts.layers, facts.hidden, facts.heads, facts.kv_heads) == (2, 64, 4, 2)
    assert (facts.head_dim, facts.intermediate, facts.vocab) == (16, 96, len(TOKENS))
    assert facts.tied
    assert facts.max_model_len == 128
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rope_theta"] == 100_000.0
    assert config["rms_norm_eps"] == 1e-5
    written = read_tensors(tmp_path / "model.safetensors")
    assert set(written) == set(tensors)
    for name, values in tensors.items():
        assert np.allclose(written[name].make(), values, rtol=2**-8), name
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode("ab c12<|end|>").tokens == ["ab", "Ġc", "1", "2", "<|end|>"]
    assert tokenizer.decode([8, 9]) == "ab c"
    words = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (words["bos_token"], words["eos_token"]) == ("<|start|>", "<|end|>")
    assert "messages" in words["chat_template"]


def test_an_untied_head_is_kept(tmp_path: Path) -> None:
    tensors = plain_tensors()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    model = GgufModel(write_gguf(tmp_path / "m.gguf", tensors))
    assert not model.config()["tie_word_embeddings"]
    assert np.array_equal(model.tensors()["lm_head.weight"].make(), tensors["lm_head.weight"])


def refused(path: Path, folder: Path) -> str:
    with pytest.raises(OServeError) as error:
        GgufModel(path).write(folder)
    assert error.value.place == str(path)
    assert error.value.remedy
    return error.value.message


def test_what_is_not_known_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    tensors = plain_tensors()
    assert "'qwen2'" in refused(write_gguf(path, tensors, architecture="qwen2"), tmp_path)
    assert "'odd'" in refused(write_gguf(path, tensors, pre="odd"), tmp_path)
    biased = {**tensors, "blk.0.attn_q.bias": np.zeros(HIDDEN, dtype=np.float32)}
    assert "blk.0.attn_q.bias" in refused(write_gguf(path, biased), tmp_path)
    lacking = {name: values for name, values in tensors.items() if "norm" not in name}
    assert "is missing" in refused(write_gguf(path, lacking), tmp_path)
    path.write_bytes(b"no such file" * 9)
    assert "cannot be read" in refused(path, tmp_path)
    assert "cannot be read" in refused(tmp_path / "none.gguf", tmp_path)


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", plain_tensors())
    whole = path.read_bytes()
    for part in (0.1, 0.5, 0.99):
        path.write_bytes(whole[: int(part * len(whole))])
        assert "cannot be read" in refused(path, tmp_path)


def test_another_model_leaves_nothing_behind(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", plain_tensors())
    with pytest.raises(OServeError, match="parameters"):
        make_smollm2(tmp_path / "models" / "smollm2", path)
    assert list((tmp_path / "models").iterdir()) == []


@given(seed=st.integers(0), rows=st.integers(1, 9), columns=st.integers(1, 9))
def test_int8_is_within_half_a_step(seed: int, rows: int, columns: int) -> None:
    weight = np.random.default_rng(seed).standard_normal((rows, columns), dtype=np.float32)
    weight[0] = 0
    scale = scales(weight)
    assert scale.shape == (rows, 1)
    rounded = np.clip(np.rint(weight / scale), -127, 127)
    assert np.all(np.abs(rounded * scale - weight) <= scale * 0.51)


def test_an_int8_copy_of_an_unpacked_model(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    once(folder, GgufModel(write_gguf(tmp_path / "m.gguf", plain_tensors())).write)
    made = read_tensors(make_int8_variant(folder, tmp_path / "m8") / "model.safetensors")
    plain = read_tensors(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    back = made[name].make() * made[name.replace("weight", "weight_scale")].make()
    assert np.allclose(back, plain[name].make(), atol=0.02)
    embedding = "model.embed_tokens.weight"
    assert np.array_equal(made[embedding].make(), plain[embedding].make())
    assert {item.name for item in folder.iterdir()} == {
        item.name for item in (tmp_path / "m8").iterdir()
    }


def test_tensors_round_trip_and_cut_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    values: Any = np.arange(-6, 6, dtype=np.float32).reshape(3, 4)
    write_tensors(
        path,
        {
            "a": tensor(values),
            "b": tensor(values / 3, kind="F32"),
            "c": tensor(values.astype(np.int8)),
        },
    )
    found = read_tensors(path)
    assert np.array_equal(found["a"].make(), values)
    assert np.array_equal(found["b"].make(), values / 3)
    assert np.array_equal(found["c"].make(), values.astype(np.int8))
    whole = path.read_bytes()
    for size in (0, 4, 40, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(OServeError, match="safetensors"):
            read_tensors(path)


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        write_json(folder / "config.json", {"half": "written"})
        raise OServeError("no more", place="here", remedy="none")

    with pytest.raises(OServeError, match="no more"):
        once(tmp_path / "models" / "m", write)
    assert list((tmp_path / "models").iterdir()) == []
