"""Shard maps against vLLM's own models: names and shapes of each rank's parameters."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("vllm_layouts.py")


@pytest.mark.engine
@pytest.mark.parametrize(
    ("architecture", "precisions"),
    [
        ("LlamaForCausalLM", ["bf16", "int8", "fp8", "int4"]),
        ("Qwen2ForCausalLM", ["bf16", "int8", "fp8", "int4"]),
        ("Qwen3ForCausalLM", ["bf16", "int8", "fp8", "int4"]),
        ("OPTForCausalLM", ["bf16", "int8", "fp8", "int4"]),
        # vLLM has no int8 or int4 mixtures for CPU.
        ("MixtralForCausalLM", ["bf16", "fp8"]),
        ("Qwen3MoeForCausalLM", ["bf16", "fp8"]),
    ],
)
def test_shard_maps_are_those_of_vllm(architecture: str, precisions: list[str]) -> None:
    pytest.importorskip("vllm")
    done = subprocess.run(
        [sys.executable, str(PROGRAM), architecture, *precisions],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("rank ")]
    # Twelve ranks per precision, and nothing after the count of parameters.
    assert len(lines) == 12 * len(precisions)
    assert [line for line in lines if len(line.split()) > 6] == []
