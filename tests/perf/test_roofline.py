"""The roofline: how step time must move, and what fitting recovers."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oserve.core import Precision, ReplicaShape
from oserve.perf.coefficients import find_coefficients
from oserve.perf.device import Link, find_device
from oserve.perf.fit import MeasuredStep, fit_coefficients, relative_errors
from oserve.perf.known_models import find_model
from oserve.perf.model_config import model_from_config
from oserve.perf.roofline import Coefficients, Roofline, hops_between_nodes

H100 = find_device("H100")


def roofline(
    name: str = "llama-3.1-70b",
    *,
    tp: int = 4,
    pp: int = 1,
    precision: Precision = Precision.BF16,
    fit: Coefficients | None = None,
) -> Roofline:
    return Roofline(
        find_model(name),
        H100,
        fit or find_coefficients("H100", precision).coefficients,
        tensor_parallel_size=tp,
        pipeline_parallel_size=pp,
        precision=precision,
    )


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    st.integers(0, 8192),
    st.integers(0, 256),
    st.integers(1, 100_000),
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from(["llama-3.1-70b", "mixtral-8x7b", "opt-66b"]),
)
def test_more_work_never_takes_less_time(
    prompt: int, decoding: int, cached: int, tp: int, name: str
) -> None:
    step = roofline(name, tp=tp)
    attended = prompt * prompt / 2
    here = step.step_s(prompt, attended, decoding, cached)
    assert here > 0
    assert step.step_s(prompt + 64, attended, decoding, cached) >= here
    assert step.step_s(prompt, attended, decoding + 8, cached) >= here
    assert step.step_s(prompt, attended + 1e6, decoding, cached) >= here
    assert step.step_s(prompt, attended, decoding, cached + 1000) >= here


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.integers(0, 4096), st.integers(1, 256), st.integers(0, 200_000), st.integers(1, 50_000))
def test_time_is_affine_in_cached_tokens(
    prompt: int, decoding: int, cached: int, more: int
) -> None:
    step = roofline()
    at = [float(step.step_s(prompt, 0.0, decoding, cached + i * more)) for i in range(3)]
    assert at[2] - at[1] == pytest.approx(at[1] - at[0], rel=1e-6, abs=1e-12)


def test_arrays_give_what_numbers_give() -> None:
    step = roofline()
    prompts = np.array([0.0, 512.0, 2048.0])
    decoding = np.array([[1.0], [64.0]])
    table = step.step_s(prompts, prompts**2 / 2, decoding, decoding * 1000)
    assert table.shape == (2, 3)
    for row, count in enumerate(decoding[:, 0]):
        for column, prompt in enumerate(prompts):
            alone = step.step_s(prompt, prompt**2 / 2, count, count * 1000)
            assert table[row, column] == pytest.approx(float(alone))


def test_precisions_and_ranks_speed_up_decoding() -> None:
    decode = (0.0, 0.0, 8.0, 8000.0)
    assert roofline(precision=Precision.FP8).step_s(*decode) < roofline().step_s(*decode)
    assert roofline(tp=8).step_s(*decode) < roofline(tp=4).step_s(*decode)
    # Stages are passed one after another: a pipeline does not make one token come sooner.
    assert roofline(tp=4, pp=2).step_s(*decode) >= roofline(tp=4).step_s(*decode)


def test_experts_are_read_only_when_chosen() -> None:
    step = roofline("mixtral-8x7b", tp=2)
    one, many = (float(step.step_s(0.0, 0.0, count, 0.0)) for count in (1.0, 64.0))
    dense = roofline("llama-3.1-70b", tp=2)
    single, full = (float(dense.step_s(0.0, 0.0, count, 0.0)) for count in (1.0, 64.0))
    assert many / one > full / single


def test_two_dozen_noisy_steps_recover_the_coefficients() -> None:
    truth = Coefficients(gemm=0.6, memory=0.7, kv=0.7, layer_s=8e-5)
    draw = random.Random(3)
    steps = []
    for _ in range(24):
        prompt = draw.choice([0.0, 256.0, 1024.0, 4096.0])
        decoding = draw.choice([1.0, 16.0, 64.0, 256.0])
        load = (prompt, prompt**2 / 2, decoding, decoding * draw.choice([200.0, 4000.0]))
        seconds = float(roofline(fit=truth).step_s(*load)) * draw.lognormvariate(0.0, 0.02)
        steps.append(
            MeasuredStep(
                prefill_tokens=load[0],
                attended_tokens=load[1],
                decode_seqs=load[2],
                kv_tokens=load[3],
                seconds=seconds,
                engine="one",
            )
        )
    # One device disturbed one step; it must not bend the curve.
    steps[5] = MeasuredStep(
        prefill_tokens=0, attended_tokens=0, decode_seqs=1, kv_tokens=200, seconds=1.0, engine="one"
    )
    found = fit_coefficients(
        steps,
        {"one": lambda fit: roofline(fit=fit)},
        free={"gemm": (0.1, 1.0), "memory": (0.1, 1.0), "layer_s": (1e-6, 1e-3)},
        start=Coefficients(),
        tied={"kv": "memory"},
    )
    assert found.kv == found.memory
    errors = relative_errors(steps, {"one": roofline(fit=found)})
    assert np.median(np.abs(errors)) < 0.03
    assert found.gemm == pytest.approx(0.6, rel=0.05)


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 16))
def test_a_replica_takes_as_few_nodes_as_divide_its_stages(
    width: int, stages: int, node: int
) -> None:
    shape = ReplicaShape(tensor_parallel_size=width, pipeline_parallel_size=stages)
    hops = hops_between_nodes(shape, node)
    assert hops_between_nodes(shape, None) == 0
    assert hops <= hops_between_nodes(shape, max(1, node - 1))
    if width > node:
        assert hops == stages - 1
        return
    each = stages // (hops + 1)
    assert stages % (hops + 1) == 0
    assert each * width <= node
    fewer = [count for count in range(1, hops + 1) if stages % count == 0]
    assert all(stages // count * width > node for count in fewer)


def test_stages_on_other_nodes_pay_the_network() -> None:
    """Two of three transitions stay on a node, as one does that leads to the other node."""
    slow = Link(name="slow", bandwidth=1e9, latency_s=1e-3)
    model, device = find_model("llama-2-70b"), H100

    def seconds(hops: int, link: Link | None) -> float:
        step = Roofline(
            model,
            device,
            Coefficients(),
            pipeline_parallel_size=4,
            stage_link=link,
            node_hops=hops,
        )
        return float(step.step_s(1000.0, 5e5, 0.0, 0.0))

    inside = seconds(0, slow)
    assert inside == seconds(0, None) == pytest.approx(seconds(3, device.link))
    each = 1e-3 + 1000 * model.hidden * 2 / 1e9
    own = device.link.latency_s + 1000 * model.hidden * 2 / device.link.bandwidth
    assert seconds(1, slow) - inside == pytest.approx(each - own)
    assert seconds(2, slow) - inside == pytest.approx(2 * (each - own))


def differing(name: str, tensor_parallel_size: int = 1) -> Roofline:
    """The roofline of a model whose layers differ."""
    configs = json.loads((Path(__file__).parent / "models/configs.json").read_text())
    facts = model_from_config(configs[name], name=name, place=name)
    return Roofline(
        facts, find_device("H100"), Coefficients(), tensor_parallel_size=tensor_parallel_size
    )


def decode_s(model: Roofline, context: float, seqs: float = 8.0) -> float:
    return float(model.step_s(0.0, 0.0, seqs, seqs * context))


def test_windows_are_read_up_to_their_size() -> None:
    """Of Mistral's first model every layer has a window of 4,096."""
    model = differing("mistral-7b-v0.1")
    assert decode_s(model, 2000) < decode_s(model, 4096) == decode_s(model, 30_000)
    prompts = [float(model.step_s(2048.0, 2048.0 * context, 0.0, 0.0)) for context in (4096, 9999)]
    assert prompts[0] == prompts[1]


def test_states_cost_the_same_at_any_length() -> None:
    model = differing("falcon-mamba-7b")
    assert decode_s(model, 100) == decode_s(model, 100_000)
    assert decode_s(model, 100) < decode_s(model, 100, seqs=16)


def test_latents_are_read_once_and_computed_by_each_head() -> None:
    """On one rank, 128 heads take longer to compute than their latent to read; on 16 they do not.

    A latent of 576 values of 2 bytes: whole on every rank.
    """
    alone, many = differing("deepseek-v3.2"), differing("deepseek-r1", 16)
    added = decode_s(many, 20_000) - decode_s(many, 10_000)
    device = find_device("H100")
    read = 8 * 10_000 * 61 * 576 * 2 / (device.bandwidth * Coefficients().kv)
    assert added == pytest.approx(read, rel=0.01)
    # Sparse attention reads 2,048 latents; only its index of 132 bytes a token grows.
    grown = decode_s(alone, 200_000) - decode_s(alone, 100_000)
    assert 0 <= grown < 8 * 100_000 * 61 * 576 * 2 / (device.bandwidth * Coefficients().kv) / 3
    one = differing("deepseek-r1")
    computed = decode_s(one, 20_000) - decode_s(one, 10_000)
    assert computed > 1.1 * read
