"""A tiny Llama with random weights: a model that can be served anywhere, in seconds, offline.

One token is one byte, so that a prompt's length is its number of tokens. One residual dimension is
constant: every embedding holds the same value there, and no layer writes to it. Its column of
``lm_head`` is therefore a bias per token, which limits answers to printable ASCII, with letters
about as frequent as in English, and gives the end token a constant probability. It does not know
engines. It needs no torch, whose import would take longer than everything here.
"""

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

from oserve.engines.checkpoints.folder import CONFIG, WEIGHTS, once, write_json
from oserve.engines.checkpoints.int8 import make_int8_variant
from oserve.engines.checkpoints.tensors import AnyArray, FloatArray, tensor, write_tensors

Tensors = dict[str, AnyArray]

HIDDEN = 256
INTERMEDIATE = 704  # a multiple of 32 per shard up to TP=2, which 4-bit packing asks for
LAYERS = 4
HEADS = 8
KV_HEADS = 4
VOCAB = 320
CONTEXT = 8192

_SPECIALS = ("<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|pad|>")
_BEGIN, _END, _PAD = 256, 257, 261
_CONSTANT = HIDDEN - 1
_CONSTANT_VALUE = 4.0
_FORBIDDEN = -60.0
# Chosen so that answers at temperature 1 end after about 60 tokens.
_END_BIAS = 1.75
_LETTERS = "etaoinshrdlcumwfgypbvkjxqz"
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def make_tiny_model(path: Path, *, seed: int = 0) -> Path:
    """Write the model to the folder ``path`` unless it is there; a seed always gives one model.

    Needs tokenizers. An existing folder with a ``config.json`` is left as it is. Raises
    ``OSError`` when the folder cannot be written.
    """

    def write(folder: Path) -> None:
        save_weights(folder, _weights(seed))
        write_tokenizer(folder)
        write_json(folder / CONFIG, tiny_config())

    return once(path, write)


def tiny_config() -> dict[str, Any]:
    """The model's ``config.json``."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HIDDEN // HEADS,
        "vocab_size": VOCAB,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": _BEGIN,
        "eos_token_id": _END,
        "pad_token_id": _PAD,
    }


def _weights(seed: int) -> Tensors:
    """Float arrays by name. The spreads make attention peaked and answers varied."""
    source = np.random.default_rng(seed)

    def normal(rows: int, columns: int, spread: float) -> FloatArray:
        return (source.standard_normal((rows, columns)) * spread).astype(np.float32)

    embedding = normal(VOCAB, HIDDEN, 1.0)
    embedding[:, _CONSTANT] = _CONSTANT_VALUE
    ones = np.ones(HIDDEN, dtype=np.float32)
    tensors: Tensors = {"model.embed_tokens.weight": embedding, "model.norm.weight": ones}
    key_rows = KV_HEADS * HIDDEN // HEADS
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        tensors[attention + "q_proj.weight"] = normal(HIDDEN, HIDDEN, 0.12)
        tensors[attention + "k_proj.weight"] = normal(key_rows, HIDDEN, 0.12)
        tensors[attention + "v_proj.weight"] = normal(key_rows, HIDDEN, 1 / 16)
        tensors[attention + "o_proj.weight"] = normal(HIDDEN, HIDDEN, 1 / 12)
        tensors[mlp + "gate_proj.weight"] = normal(INTERMEDIATE, HIDDEN, 1 / 16)
        tensors[mlp + "up_proj.weight"] = normal(INTERMEDIATE, HIDDEN, 1 / 16)
        tensors[mlp + "down_proj.weight"] = normal(HIDDEN, INTERMEDIATE, 1 / 16)
        tensors[attention + "o_proj.weight"][_CONSTANT] = 0
        tensors[mlp + "down_proj.weight"][_CONSTANT] = 0
        tensors[prefix + "input_layernorm.weight"] = ones
        tensors[prefix + "post_attention_layernorm.weight"] = ones
    head = normal(VOCAB, HIDDEN, 2.5 / math.sqrt(HIDDEN))
    head[_END] = 0
    head[:, _CONSTANT] = _biases()
    tensors["lm_head.weight"] = head
    return tensors


def save_weights(folder: Path, tensors: Tensors) -> None:
    """Write named float arrays as the checkpoint of ``folder``."""
    write_tensors(folder / WEIGHTS, {name: tensor(values) for name, values in tensors.items()})


def _biases() -> list[float]:
    """Bias per token, in logits at a normalised constant dimension of 1."""
    bias = [_FORBIDDEN] * VOCAB
    for rank, letter in enumerate(_LETTERS):
        bias[ord(letter)] = 1.5 - 0.08 * rank
        bias[ord(letter.upper())] = -2.0
    for digit in range(ord("0"), ord("9") + 1):
        bias[digit] = -2.0
    bias[ord(" ")] = 2.0
    bias[ord(",")] = bias[ord(".")] = -0.5
    for character in range(33, 127):
        bias[character] = max(bias[character], -4.0)
    bias[_END] = _END_BIAS
    return bias


def write_tokenizer(folder: Path) -> None:
    """Write the byte-level tokenizer, its chat template and the generation defaults."""
    # It comes with the engine packages.
    from tokenizers import (  # noqa: PLC0415
        AddedToken,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
    )

    characters = _byte_characters()
    vocabulary = {character: byte for byte, character in enumerate(characters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = [*_SPECIALS, *(f"<|reserved{i}|>" for i in range(256 + len(_SPECIALS), VOCAB))]
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in names])
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|begin|>",
            "eos_token": "<|end|>",
            "pad_token": "<|pad|>",
            "model_max_length": CONTEXT,
            "clean_up_tokenization_spaces": False,
            "chat_template": _CHAT_TEMPLATE,
        },
    )
    write_json(
        folder / "generation_config.json",
        {"bos_token_id": _BEGIN, "eos_token_id": _END, "pad_token_id": _PAD, "do_sample": True},
    )


def _byte_characters() -> list[str]:
    """The character that stands for each byte in byte-level tokenizers (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {byte: chr(byte) for byte in plain}
    for offset, byte in enumerate(sorted(set(range(256)) - set(plain))):
        table[byte] = chr(256 + offset)
    return [table[byte] for byte in range(256)]


if __name__ == "__main__":
    made = make_tiny_model(Path(sys.argv[1]))
    make_int8_variant(made, made.with_name(made.name + "-int8"))
