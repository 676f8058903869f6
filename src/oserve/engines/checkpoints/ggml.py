"""Reads Llama models from GGUF files of llama.cpp: tensors, configuration, tokenizer.

GGUF has its own tensor names, holds the configuration as metadata and quantises in blocks of 32
values. Its query and key projections order rows for rotary embeddings of neighbouring pairs,
Hugging Face's for embeddings that rotate halves. A file with an unknown tensor is refused: a model
that lacks a part would still answer.
"""

from pathlib import Path
from typing import Any

import numpy as np

from oserve.core import OServeError
from oserve.engines.checkpoints.folder import CONFIG, WEIGHTS, write_json
from oserve.engines.checkpoints.tensors import CheckpointTensor, FloatArray, write_tensors

_OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_INSIDE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Token types of GGUF that are no text: control and user-defined tokens.
_CONTROL, _USER_DEFINED = 3, 4
_REMEDY = "give a Llama model whose tokenizer is a byte-level BPE (gpt2), written by llama.cpp"


class GgufModel:
    """A model in a GGUF file. Raises ``OServeError`` for a file that is none.

    Needs gguf, and tokenizers for ``write``.
    """

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader  # noqa: PLC0415 - comes with the model, see requirements

        self._place = str(path)
        try:
            reader = GGUFReader(path)
            self._fields: dict[str, Any] = {
                name: field.contents() for name, field in reader.fields.items()
            }
            self._tensors = {item.name: item for item in reader.tensors}
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise self._refused(f"it cannot be read: {error}") from None
        kind = self._fields.get("general.architecture")
        if kind != "llama":
            raise self._refused(f"its architecture is {kind!r}, not 'llama'")
        self._heads = self._count("attention.head_count")
        self._kv_heads = self._count("attention.head_count_kv")
        self._hidden = self._count("embedding_length")

    def write(self, folder: Path) -> None:
        """Weights in bf16, tokenizer and, last, configuration, as a Hugging Face folder."""
        write_tensors(folder / WEIGHTS, self.tensors())
        self._write_tokenizer(folder)
        write_json(folder / CONFIG, self.config())

    def config(self) -> dict[str, Any]:
        """The fields of ``LlamaConfig``."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self._hidden,
            "intermediate_size": self._count("feed_forward_length"),
            "num_hidden_layers": self._count("block_count"),
            "num_attention_heads": self._heads,
            "num_key_value_heads": self._kv_heads,
            "head_dim": self._hidden // self._heads,
            "vocab_size": int(self._tensor("token_embd.weight").shape[1]),
            "max_position_embeddings": self._count("context_length"),
            # GGUF stores 32-bit floats; the shortest decimal is the one that was meant.
            "rms_norm_eps": _plain(self._field("llama.attention.layer_norm_rms_epsilon")),
            "rope_theta": _plain(self._fields.get("llama.rope.freq_base", 10_000.0)),
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "torch_dtype": "bfloat16",
            **self._special_ids(),
        }

    def tensors(self) -> dict[str, CheckpointTensor]:
        """Tensors by their Hugging Face names; ``make`` dequantises the values."""
        layers = self._count("block_count")
        wanted = dict(_OUTSIDE)
        if "output.weight" not in self._tensors:
            del wanted["output.weight"]
        for layer in range(layers):
            for own, name in _INSIDE.items():
                wanted[f"blk.{layer}.{own}.weight"] = f"model.layers.{layer}.{name}.weight"
        odd = sorted(set(self._tensors) - set(wanted))
        if odd:
            raise self._refused(
                f"the tensor {odd[0]!r} is in no Llama model that this version knows"
            )
        return {name: self._unpacked(own) for own, name in wanted.items()}

    def _unpacked(self, name: str) -> CheckpointTensor:
        item = self._tensor(name)
        # GGUF names the fastest dimension first.
        shape = tuple(int(size) for size in reversed(item.shape))
        heads = {"attn_q": self._heads, "attn_k": self._kv_heads}.get(name.split(".")[-2])

        def make() -> FloatArray:
            from gguf import dequantize  # noqa: PLC0415

            values = dequantize(item.data, item.tensor_type).reshape(shape)
            found = values if heads is None else unpaired(values, heads)
            return found.astype(np.float32, copy=False)

        return CheckpointTensor(kind="BF16", shape=shape, make=make)

    def _write_tokenizer(self, folder: Path) -> None:
        from tokenizers import AddedToken, Tokenizer, decoders, models  # noqa: PLC0415

        kind = self._field("tokenizer.ggml.model")
        if kind != "gpt2":
            raise self._refused(f"its tokenizer is of the kind {kind!r}")
        tokens: list[str] = self._field("tokenizer.ggml.tokens")
        types = self._fields.get("tokenizer.ggml.token_type", [1] * len(tokens))
        merges = [tuple(line.split(" ", 1)) for line in self._field("tokenizer.ggml.merges")]
        vocabulary = {token: number for number, token in enumerate(tokens)}
        try:
            tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
        except Exception as error:  # tokenizers raises this very class for a bad vocabulary
            raise self._refused(f"its tokenizer is not valid: {error}") from None
        tokenizer.pre_tokenizer = self._pre_tokenizer()
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(
            [
                AddedToken(token, special=True, normalized=False)
                for token, kind in zip(tokens, types, strict=True)
                if kind in {_CONTROL, _USER_DEFINED}
            ]
        )
        tokenizer.save(str(folder / "tokenizer.json"))
        ids = self._special_ids()
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{name.removesuffix("_id"): tokens[number] for name, number in ids.items()},
            "model_max_length": self._count("context_length"),
            "clean_up_tokenization_spaces": False,
        }
        template = self._fields.get("tokenizer.chat_template")
        if template:
            config["chat_template"] = template
        write_json(folder / "tokenizer_config.json", config)
        write_json(folder / "generation_config.json", ids)

    def _pre_tokenizer(self) -> Any:
        """How text is split before merges apply, by llama.cpp's name for it."""
        from tokenizers import pre_tokenizers  # noqa: PLC0415

        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        digits = pre_tokenizers.Digits(individual_digits=True)
        known = {
            "smollm": pre_tokenizers.Sequence([digits, byte_level]),
            "gpt-2": byte_level,
        }
        kind = self._fields.get("tokenizer.ggml.pre", "gpt-2")
        if kind not in known:
            raise self._refused(f"its tokenizer splits text in an unknown way ({kind!r})")
        return known[kind]

    def _special_ids(self) -> dict[str, int]:
        names = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
        found = {
            name: self._fields.get(f"tokenizer.ggml.{own}_token_id") for own, name in names.items()
        }
        return {name: number for name, number in found.items() if number is not None}

    def _count(self, name: str) -> int:
        return int(self._field(f"llama.{name}"))

    def _field(self, name: str) -> Any:
        if name not in self._fields:
            raise self._refused(f"the field {name!r} is missing")
        return self._fields[name]

    def _tensor(self, name: str) -> Any:
        if name not in self._tensors:
            raise self._refused(f"the tensor {name!r} is missing")
        return self._tensors[name]

    def _refused(self, why: str) -> OServeError:
        return OServeError(why, place=self._place, remedy=_REMEDY)


def paired(weight: FloatArray, heads: int) -> FloatArray:
    """Rows of a query or key projection in GGUF's order: the halves of each head interleaved."""
    outputs, inputs = weight.shape
    halves = weight.reshape(heads, 2, outputs // heads // 2, inputs)
    return halves.swapaxes(1, 2).reshape(outputs, inputs)


def unpaired(weight: FloatArray, heads: int) -> FloatArray:
    """The reverse of ``paired``: rows in Hugging Face's order."""
    outputs, inputs = weight.shape
    pairs = weight.reshape(heads, outputs // heads // 2, 2, inputs)
    return pairs.swapaxes(1, 2).reshape(outputs, inputs)


def _plain(value: float) -> float:
    """The shortest decimal of the same 32-bit float."""
    return float(str(np.float32(value)))
