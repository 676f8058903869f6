"""What tests of the wiring share."""

from pathlib import Path

import msgspec
import pytest

from oserve.engines.tiny import CONTEXT, HEADS, HIDDEN, INTERMEDIATE, KV_HEADS, LAYERS, VOCAB


@pytest.fixture
def model(tmp_path: Path) -> str:
    """The configuration of the tiny model, which is all that planning needs of it."""
    folder = tmp_path / "tiny-llama"
    folder.mkdir()
    config = {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "intermediate_size": INTERMEDIATE,
        "vocab_size": VOCAB,
        "max_position_embeddings": CONTEXT,
    }
    (folder / "config.json").write_bytes(msgspec.json.encode(config))
    return str(folder)
