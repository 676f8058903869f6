"""Cut-down models of several families, served by real engines: memory and KV tokens as predicted.

Two layers or one period of them, and weights that mean nothing.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from engines import families
from engines.families import CACHE_BYTES, CONTEXT, STEP_TOKENS
from oserve.core import Precision, ReplicaShape
from oserve.perf.kv_cache import BLOCK_TOKENS
from oserve.perf.memory import groups_of, weights_bytes
from oserve.perf.model_config import read_model

pytestmark = [pytest.mark.engine, pytest.mark.slow]

CONFIGS: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "perf/models/configs.json").read_text()
)
# Real configurations, cut down by these values; widths stay, so that blocks are real ones.
CUT: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {},
    "qwen3-8b": {},
    "gemma-2-2b": {},
    "mistral-7b-v0.1": {"sliding_window": 512},
    "qwen3-30b-a3b": {"num_experts": 8},
    "gpt2-xl": {"n_layer": 2},
    "olmo-2-13b": {},
    "granite-3-8b": {},
    "gemma-3-1b": {"sliding_window_pattern": 2, "sliding_window": 512},
}
_SMALL = {"num_hidden_layers": 2, "vocab_size": 512, "max_position_embeddings": CONTEXT}


def cut(name: str) -> dict[str, Any]:
    config = {**CONFIGS[name], **_SMALL, **CUT[name]}
    config.pop("layer_types", None)
    config.pop("rope_scaling", None)
    return config


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("families")
    for name in CUT:
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(cut(name)))
    script = [sys.executable, families.__file__, str(folder)]
    # vLLM leaves files of its own behind; a short path, since sockets are among them.
    with tempfile.TemporaryDirectory(prefix="f") as short:
        env = os.environ | {"TMPDIR": short}
        told = subprocess.run(
            script, capture_output=True, text=True, check=False, timeout=600, env=env
        )
    lines = [json.loads(line) for line in told.stdout.splitlines() if line.startswith("{")]
    assert lines, told.stderr[-3000:]
    return {line["name"]: line for line in lines}


@pytest.mark.parametrize("name", CUT)
def test_a_family_takes_what_is_predicted(
    name: str, answers: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    found = answers[name]
    assert "error" not in found, found["error"]
    assert found["generated"] == 4
    (tmp_path / "config.json").write_text(json.dumps(cut(name)))
    facts = read_model(tmp_path / "config.json")
    shape = ReplicaShape(
        precision=Precision.BF16, max_num_batched_tokens=STEP_TOKENS, max_num_seqs=4
    )
    assert weights_bytes(facts, shape) == pytest.approx(found["weights"], rel=0.05)
    groups = groups_of(facts, shape, BLOCK_TOKENS)
    tokens = CONTEXT * CACHE_BYTES / groups.request_bytes(CONTEXT, STEP_TOKENS)
    assert tokens == pytest.approx(found["kv_tokens"], rel=0.05)
