"""Fixtures of a machine and a model on which nothing needs to run."""

from pathlib import Path

import msgspec
import pytest

from oserve.engines.tiny import CONTEXT, HEADS, HIDDEN, INTERMEDIATE, KV_HEADS, LAYERS, VOCAB

# Processors that tests run as if on, whatever the machine: flags as /proc/cpuinfo spells them.
CPUS = {
    "avx512": "avx2 fma avx512f avx512bw avx512_vnni",
    "bf16": "avx2 fma avx512f avx512bw avx512_vnni avx512_bf16",
    "amx": "avx2 fma avx512f avx512bw avx512_vnni avx512_bf16 amx_bf16 amx_tile amx_int8",
}


@pytest.fixture(autouse=True)
def free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """As much as tests of planning think there is, whatever the machine has."""
    monkeypatch.setattr("oserve.startup.sizing.available_memory_bytes", lambda: 16 << 30)


@pytest.fixture(params=sorted(CPUS))
def cpu_flags(request: pytest.FixtureRequest) -> str:
    """Of each kind of CPU in turn."""
    return CPUS[request.param]


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
