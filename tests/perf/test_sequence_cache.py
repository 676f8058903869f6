"""KV room that depends on the lengths of requests: windows, chunks and states."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oserve.core import Precision, ReplicaShape
from oserve.perf.capacity import TypeLoad, capacities
from oserve.perf.memory import cache_of_tokens, groups_of, memory_fit
from oserve.perf.model import ModelFacts
from oserve.perf.model_config import model_from_config
from oserve.perf.sequence_cache import SequenceCache
from oserve.perf.source import RooflineSource

CONFIGS: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parent / "models/configs.json").read_text()
)
SHAPE = ReplicaShape(
    precision=Precision.BF16, max_num_batched_tokens=2048, max_num_seqs=256, device_kind="H100"
)
# Enough for each of them.
ROOM_BYTES = 3e12
HYBRID = [
    "nemotron-3-nano",
    "gemma-3-27b",
    "gemma-4-31b",
    "gpt-oss-20b",
    "falcon-h1-7b",
    "jamba-1.5-mini",
    "qwen3-next-80b",
    "llama-4-scout",
    "mistral-7b-v0.1",
    "mimo-v2-flash",
    "lfm2-2.6b",
    "kimi-linear-48b",
    "falcon-mamba-7b",
    "deepseek-r1",
    "gemma-3n-e4b",
]


def facts_of(name: str) -> ModelFacts:
    return model_from_config(CONFIGS[name], name=name, place=name)


def cache_of(name: str) -> SequenceCache:
    found = memory_fit(facts_of(name), SHAPE, ROOM_BYTES).cache
    assert found is not None
    return found


@pytest.mark.parametrize("tokens", [40, 600, 3000, 8192, 60_000])
@pytest.mark.parametrize("name", HYBRID)
def test_as_many_requests_fit_as_vllms_groups_hold(name: str, tokens: int) -> None:
    fit = memory_fit(facts_of(name), SHAPE, ROOM_BYTES)
    assert fit.cache is not None
    room = fit.usable_bytes - fit.weights_bytes - fit.reserve_bytes
    groups = groups_of(facts_of(name), SHAPE)
    exact = room / groups.request_bytes(tokens, SHAPE.max_num_batched_tokens)
    assert float(fit.cache.sequences(tokens, tokens)) == pytest.approx(exact, rel=0.05)


def test_a_plain_model_has_none() -> None:
    assert memory_fit(facts_of("qwen3-8b"), SHAPE, ROOM_BYTES).cache is None


def test_states_bound_short_requests() -> None:
    """Of one H100, Nemotron-3-Nano has room for some 180 requests, however short."""
    fit = RooflineSource(facts_of("nemotron-3-nano")).memory(SHAPE)
    assert fit.cache is not None
    assert 170 < float(fit.cache.sequences(600, 600)) < 195
    assert float(fit.cache.sequences(1, 1)) < 195


def test_a_window_does_not_grow_with_the_request() -> None:
    cache = cache_of("mistral-7b-v0.1")
    short, long = (float(cache.sequences(tokens, tokens)) for tokens in (8192, 32_768))
    assert short == long
    assert float(cache.sequences(600, 600)) > 5 * short


def test_the_planner_counts_by_the_requests_lengths() -> None:
    source = RooflineSource(facts_of("nemotron-3-nano"))
    step, tokens = source.step_model(SHAPE), source.kv_tokens(SHAPE)
    load = TypeLoad(prompt_tokens=200, output_tokens=400)
    alike = capacities(step, SHAPE, tokens, [load])[0]
    own = capacities(step, SHAPE, tokens, [load], source.sequence_cache(SHAPE))[0]
    assert own.why == "KV cache"
    assert own.capacity_rps < alike.capacity_rps
    long = TypeLoad(prompt_tokens=200, output_tokens=400, longest_tokens=50_000_000)
    never = capacities(step, SHAPE, tokens, [long], source.sequence_cache(SHAPE))[0]
    assert never.capacity_rps == 0
    assert "KV cache" in never.why


def test_tokens_that_an_engine_states_are_those_of_its_longest_requests() -> None:
    facts = facts_of("nemotron-3-nano")
    cache = cache_of_tokens(facts, SHAPE, 1_000_000, 50_000)
    assert cache is not None
    assert float(cache.sequences(50_000, 50_000)) == pytest.approx(20, rel=0.05)
    assert cache_of_tokens(facts, SHAPE, 0, 50_000) is None
    assert cache_of_tokens(facts_of("qwen3-8b"), SHAPE, 1_000_000, 50_000) is None


def test_blocks_of_arrays_are_those_of_their_numbers() -> None:
    cache = cache_of("gemma-3-27b")
    tokens = np.array([[1.0, 100.0], [5000.0, 50_000.0]])
    whole = tokens + 10
    each = [
        [float(cache.sequence_blocks(*pair)) for pair in zip(*row, strict=True)]
        for row in zip(tokens, whole, strict=True)
    ]
    assert cache.sequence_blocks(tokens, whole).tolist() == each
