"""Shard maps against vLLM's own models: names and shapes of each rank's parameters."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine

PROGRAM = Path(__file__).with_name("vllm_layouts.py")
# vLLM has no int8 or int4 mixtures for CPU.
PRECISIONS = {
    "LlamaForCausalLM": ["bf16", "int8", "fp8", "int4"],
    "Qwen2ForCausalLM": ["bf16", "int8", "fp8", "int4"],
    "Qwen3ForCausalLM": ["bf16", "int8", "fp8", "int4"],
    "OPTForCausalLM": ["bf16", "int8", "fp8", "int4"],
    "MixtralForCausalLM": ["bf16", "fp8"],
    "Qwen3MoeForCausalLM": ["bf16", "fp8"],
}


@pytest.fixture(scope="module")
def told() -> "subprocess.CompletedProcess[str]":
    """What one process says of all, since importing vLLM takes longer than the rest."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    asked = [f"{name}={','.join(precisions)}" for name, precisions in PRECISIONS.items()]
    return subprocess.run(
        [sys.executable, str(PROGRAM), *asked],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("architecture", PRECISIONS)
def test_shard_maps_are_those_of_vllm(
    told: "subprocess.CompletedProcess[str]", architecture: str
) -> None:
    assert told.returncode == 0, told.stderr[-3000:]
    lines = [line for line in told.stdout.splitlines() if line.startswith(architecture + " ")]
    # Twelve ranks per precision, and nothing after the count of parameters.
    assert len(lines) == 12 * len(PRECISIONS[architecture])
    assert [line for line in lines if len(line.split()) > 6] == []
