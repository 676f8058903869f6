"""The tiny model's files."""

import hashlib
import json
from pathlib import Path

import pytest

from oserve.engines.checkpoints.int8 import make_int8_variant
from oserve.engines.tiny import VOCAB, make_tiny_model

pytest.importorskip("tokenizers")


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_a_seed_always_gives_the_same_model(tmp_path: Path) -> None:
    one = digest(make_tiny_model(tmp_path / "a"))
    assert one == digest(make_tiny_model(tmp_path / "b"))
    assert one != digest(make_tiny_model(tmp_path / "c", seed=1))


def test_what_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("mine")
    make_tiny_model(tmp_path / "m")
    assert (tmp_path / "m" / "config.json").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_one_token_is_one_byte(tmp_path: Path) -> None:
    from tokenizers import Tokenizer  # noqa: PLC0415 - an optional package

    tokenizer = Tokenizer.from_file(str(make_tiny_model(tmp_path / "m") / "tokenizer.json"))
    text = "Grüße,  <|user|>\n\u4f60"
    ids = tokenizer.encode("Grüße,  \n\u4f60").ids
    assert ids == list("Grüße,  \n\u4f60".encode())
    assert tokenizer.decode(ids) == "Grüße,  \n\u4f60"
    assert 259 in tokenizer.encode(text).ids
    assert tokenizer.get_vocab_size() == VOCAB


def test_int8_copy_is_smaller_and_says_what_it_is(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "m")
    small = make_int8_variant(model, tmp_path / "m8")
    config = json.loads((small / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (model, small)]
    assert sizes[1] < 0.6 * sizes[0]
    assert {path.name for path in small.iterdir()} == {path.name for path in model.iterdir()}
