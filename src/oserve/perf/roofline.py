"""Seconds of one engine step: a roofline with a few fitted coefficients.

A step computes prompt tokens and one token per decoding sequence. Per layer: each matrix product
takes (compute^4 + memory^4)^(1/4), which rounds off the roofline's corner; activations and norms
move bytes; prompt tokens attend to the tokens before them; decoding reads the KV cache; two
all-reduces join tensor-parallel ranks, alpha * log2(tp) + 2 (tp-1)/tp * bytes / link; and each
layer has a fixed overhead. The LM head and the engine's overheads per step and per sequence are
added. A step passes the stages of a pipeline in sequence, so its latency sums over all layers.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from oserve.core import Precision, ReplicaShape
from oserve.perf.device import DeviceFacts, Link
from oserve.perf.layers import LayerKind, Part
from oserve.perf.model import ModelFacts

Floats = NDArray[np.float64]

_ACTIVATION_BYTES = 2.0
_KV_BYTES = 2.0
# Reads and writes of the residual stream around a layer's two norms and additions.
_RESIDUAL_PASSES = 8.0
# Products and sums of a token with each value of a state: decay, update, read.
_STATE_FLOPS = 6.0
_WEIGHT_BYTES = {
    Precision.FP32: 4.0,
    Precision.BF16: 2.0,
    Precision.FP16: 2.0,
    Precision.FP8: 1.0,
    Precision.INT8: 1.0,
    # Groups of 128 weights share a 16-bit scale and a zero point.
    Precision.INT4: 0.5 + 4.0 / 128,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Coefficients:
    """The fitted coefficients: achieved shares of the peaks, and fixed times in seconds.

    ``sequence_s`` is per sequence and step, ``step_s`` per step, ``layer_s`` per layer,
    ``mixed_s`` per layer of a step with both prompts and decoding; ``wake_s`` is per step of
    prompts alone, before which the engine was idle.
    """

    gemm: float = 0.766
    memory: float = 0.892
    kv: float = 0.892
    attention: float = 0.64
    all_reduce: float = 0.733
    all_reduce_latency_s: float = 0.42e-6
    all_reduce_crowding: float = 0.0
    gemm_depth: float = 0.0
    layer_s: float = 50.9e-6
    mixed_s: float = 0.0
    step_s: float = 0.0
    sequence_s: float = 0.0
    hop_s: float = 0.0
    wake_s: float = 0.0

    def as_dict(self) -> dict[str, float]:
        """The values by name."""
        return asdict(self)


COEFFICIENT_NAMES = tuple(item.name for item in fields(Coefficients))


def coefficients_from(values: Mapping[str, float]) -> Coefficients:
    """Coefficients from values by name; ignores unknown names, missing ones take defaults."""
    return Coefficients(**{k: float(v) for k, v in values.items() if k in COEFFICIENT_NAMES})


class StepModel(Protocol):
    """A model of the duration of an engine step.

    All arguments are arrays (or numbers) that broadcast together: prompt tokens of the step, the
    sum over them of the tokens each attends to, decoding sequences, and tokens in their caches.
    The result is in seconds, for one micro-batch through all pipeline stages.
    """

    def step_s(
        self,
        prefill_tokens: Floats | float,
        attended_tokens: Floats | float,
        decode_seqs: Floats | float,
        kv_tokens: Floats | float,
    ) -> Floats: ...


def weight_bytes(precision: Precision) -> float:
    """Bytes per weight, scales included."""
    return _WEIGHT_BYTES[precision]


def kv_bytes_per_value(precision: Precision) -> float:
    """Bytes of one cached value, which has the width of activations."""
    return 4.0 if precision is Precision.FP32 else _KV_BYTES


def hops_between_nodes(shape: ReplicaShape, node_devices: int | None) -> int:
    """Transitions between pipeline stages that lead to another node; ``None``: one node has all.

    vLLM runs equally many stages on each node, so a replica takes as few nodes as divide its
    stages.
    """
    stages, width = shape.pipeline_parallel_size, shape.tensor_parallel_size
    if node_devices is None:
        return 0
    if node_devices < width:
        return stages - 1
    most = min(stages, node_devices // width)
    each = next(number for number in range(most, 0, -1) if stages % number == 0)
    return stages // each - 1


class Roofline:
    """A step model for one model, device kind, parallel sizes and precision.

    ``tensor_link`` and ``stage_link`` connect tensor-parallel ranks and pipeline stages that lie on
    different nodes; ``None``: the device's own link. ``node_hops``: how many of the transitions
    between stages lead to another node (see ``hops_between_nodes``).
    """

    def __init__(
        self,
        model: ModelFacts,
        device: DeviceFacts,
        coefficients: Coefficients,
        *,
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        precision: Precision = Precision.BF16,
        tensor_link: Link | None = None,
        stage_link: Link | None = None,
        node_hops: int = 0,
    ) -> None:
        self._model = model
        self._tp = tensor_parallel_size
        self._pp = pipeline_parallel_size
        self._fit = coefficients
        self._bandwidth = device.bandwidth * coefficients.memory
        self._kv_bandwidth = device.bandwidth * coefficients.kv
        self._flops = device.peak_flops(precision) * coefficients.gemm
        plain = Precision.FP32 if precision is Precision.FP32 else Precision.BF16
        self._head_flops = device.peak_flops(plain) * coefficients.gemm
        self._attention_flops = device.peak_flops(plain) * coefficients.attention
        # A quantised checkpoint counts as it is stored, on average over a part of a layer.
        self._asked_bytes = weight_bytes(precision)
        plain_kind = model.plain_kind
        self._weight_bytes = plain_kind.mean_bytes(Part.MIXER, self._asked_bytes)
        mlp = Part.EXPERT if model.experts > 1 else Part.DENSE
        self._mlp_bytes = plain_kind.mean_bytes(mlp, self._asked_bytes)
        self._plain_bytes = weight_bytes(plain)
        self._wide = 4.0 if precision is Precision.FP32 else _ACTIVATION_BYTES
        self._kv_wide = kv_bytes_per_value(precision)
        self._link = tensor_link or device.link
        self._inner_link = device.link
        self._stage_link = stage_link or device.link
        self._node_hops = node_hops

    def step_s(
        self,
        prefill_tokens: Floats | float,
        attended_tokens: Floats | float,
        decode_seqs: Floats | float,
        kv_tokens: Floats | float,
    ) -> Floats:
        """See ``StepModel``."""
        prompt = np.asarray(prefill_tokens, dtype=np.float64)
        decoding = np.asarray(decode_seqs, dtype=np.float64)
        tokens = prompt + decoding
        model, fit = self._model, self._fit
        mixed = (prompt > 0) & (decoding > 0)
        if model.kinds:
            attended = np.asarray(attended_tokens, dtype=np.float64)
            body = self._kinds_s(
                tokens, attended, decoding, np.asarray(kv_tokens, dtype=np.float64)
            )
            body = body + model.layers * (fit.layer_s + fit.mixed_s * mixed)
            return body + self._ends_s(prompt, decoding)
        layer = (
            self._projections_s(tokens)
            + self._mlp_s(tokens)
            + self._elementwise_s(tokens)
            + self._attention_s(np.asarray(attended_tokens, dtype=np.float64))
            + self._cache_s(np.asarray(kv_tokens, dtype=np.float64))
            + self._all_reduce_s(tokens)
            + fit.layer_s
            + fit.mixed_s * mixed
        )
        seconds: Floats = model.layers * layer + self._ends_s(prompt, decoding)
        return seconds

    def _ends_s(self, prompt: Floats, decoding: Floats) -> Floats:
        """Seconds of a step outside the layers: head, hops between stages, and overheads."""
        model, fit = self._model, self._fit
        tokens = prompt + decoding
        # Most steps complete about one prompt, whose last token needs the head as well.
        rows = decoding + np.minimum(prompt, 1.0)
        head = self._gemm_s(
            rows, model.hidden, model.vocab / self._tp, self._head_flops, self._plain_bytes
        )
        inner_hops = self._pp - 1 - self._node_hops
        hops = inner_hops * self._hop_s(tokens, self._inner_link) + self._node_hops * self._hop_s(
            tokens, self._stage_link
        )
        fixed = fit.step_s + fit.wake_s * ((prompt > 0) & (decoding == 0))
        seconds: Floats = head + hops + fixed + fit.sequence_s * rows
        return seconds

    def _kinds_s(
        self, tokens: Floats, attended: Floats, decoding: Floats, kv_tokens: Floats
    ) -> Floats:
        """Seconds of the layers of a model whose layers differ, without fixed times.

        The coefficients are those of plain attention and MLPs; latent, windowed and linear
        attention were not measured.
        """
        total = np.zeros_like(tokens + attended + decoding + kv_tokens)
        for kind in self._model.kinds:
            asked = self._asked_bytes
            work = self._weights_s(tokens, kind.mixer, kind.mean_bytes(Part.MIXER, asked))
            work = work + self._weights_s(tokens, kind.dense, kind.mean_bytes(Part.DENSE, asked))
            work = work + self._experts_s(tokens, kind)
            work = work + self._context_s(kind, tokens - decoding, attended, decoding, kv_tokens)
            if kind.parameters:
                parts = (kind.mixer > 0) + (kind.dense + kind.experts > 0)
                reduced = 0.5 * parts * self._all_reduce_s(tokens)
                work = work + reduced + 0.5 * parts * self._elementwise_s(tokens)
            total = total + kind.count * work
        return total

    def _weights_s(self, tokens: Floats, parameters: int, each: float) -> Floats:
        """Seconds of products with that many weights per token, whose inner size is ``hidden``."""
        hidden = self._model.hidden
        return self._gemm_s(tokens, hidden, parameters / hidden / self._tp, self._flops, each)

    def _experts_s(self, tokens: Floats, kind: LayerKind) -> Floats | float:
        if not kind.experts:
            return 0.0
        hidden = self._model.hidden
        missed = np.power(1.0 - kind.experts_per_token / kind.experts, tokens)
        return self._gemm_s(
            tokens * kind.experts_per_token,
            hidden,
            kind.expert / hidden / self._tp,
            self._flops,
            kind.mean_bytes(Part.EXPERT, self._asked_bytes),
            kind.experts * (1.0 - missed),
        )

    def _context_s(
        self,
        kind: LayerKind,
        prompt: Floats,
        attended: Floats,
        decoding: Floats,
        kv_tokens: Floats,
    ) -> Floats:
        """Seconds of attending to earlier tokens and of reading their cache, or of a state.

        Windows and sparse attention read no more than their size of each sequence, of which only
        the mean length is known. Latents are read once for all heads, which makes decoding a matter
        of computation.
        """
        cache, tp = kind.cache, self._tp
        limit = float(cache.window or cache.sparse_tokens or np.inf)
        with np.errstate(invalid="ignore"):
            seen = np.where(prompt > 0, np.minimum(attended, prompt * limit), 0.0)
            held = np.where(decoding > 0, np.minimum(kv_tokens, decoding * limit), 0.0)
        # The index of sparse attention is read whole.
        index = cache.extra_bytes * (kv_tokens - held)
        read = held * cache.token_bytes(self._kv_wide, tp) + index
        # A state is read and written.
        read = read + 2.0 * decoding * cache.state_bytes(self._kv_wide, tp)
        moved = read / self._kv_bandwidth
        flops = 4.0 * seen * kind.attention
        flops = flops + _STATE_FLOPS * prompt * cache.state_size
        absorbed = 4.0 * held * kind.latent_attention / tp / self._attention_flops
        seconds: Floats = flops / tp / self._attention_flops + np.maximum(moved, absorbed)
        return seconds

    def _hop_s(self, tokens: Floats, link: Link) -> Floats:
        """Seconds in which the activations of these tokens reach the next stage."""
        moved = tokens * self._model.hidden * self._wide
        seconds: Floats = link.latency_s + self._fit.hop_s + moved / link.bandwidth
        return seconds

    def _gemm_s(
        self,
        rows: Floats,
        inner: float,
        outer: float,
        flops: float,
        bytes_per_weight: float,
        matrices: Floats | float = 1.0,
    ) -> Floats:
        """Seconds of ``matrices`` products of ``rows`` x ``inner`` by ``inner`` x ``outer``.

        ``rows`` is the total over the matrices.
        """
        deep = (inner / 8192.0) ** self._fit.gemm_depth
        compute = 2.0 * rows * inner * outer / (flops * deep)
        moved = matrices * inner * outer * bytes_per_weight + rows * (inner + outer) * self._wide
        memory = moved / self._bandwidth
        seconds: Floats = np.power(compute**4 + memory**4, 0.25)
        return seconds

    def _projections_s(self, tokens: Floats) -> Floats:
        model, tp = self._model, self._tp
        query = model.heads * model.head_dim / tp
        key_value = 2 * max(1.0, model.kv_heads / tp) * model.head_dim
        return self._gemm_s(
            tokens, model.hidden, query + key_value, self._flops, self._weight_bytes
        ) + self._gemm_s(tokens, query, model.hidden, self._flops, self._weight_bytes)

    def _mlp_s(self, tokens: Floats) -> Floats:
        model = self._model
        up = 2 if model.gated else 1
        wide = model.intermediate / self._tp
        rows: Floats = tokens
        touched: Floats | float = 1.0
        if model.experts > 1:
            rows = tokens * model.experts_per_token
            # The expected number of experts that some token of the step selects, if uniform.
            missed = np.power(1.0 - model.experts_per_token / model.experts, tokens)
            touched = model.experts * (1.0 - missed)
        seconds = self._gemm_s(
            rows, model.hidden, up * wide, self._flops, self._mlp_bytes, touched
        ) + self._gemm_s(rows, wide, model.hidden, self._flops, self._mlp_bytes, touched)
        if model.shared_intermediate:
            shared = 3 * model.shared_intermediate / self._tp
            seconds = seconds + self._gemm_s(
                tokens, model.hidden, shared, self._flops, self._mlp_bytes
            )
        return seconds

    def _elementwise_s(self, tokens: Floats) -> Floats:
        model = self._model
        width = _RESIDUAL_PASSES * model.hidden + 3 * (
            model.experts_per_token * model.intermediate / self._tp
        )
        seconds: Floats = tokens * width * self._wide / self._bandwidth
        return seconds

    def _attention_s(self, attended: Floats) -> Floats:
        width = self._model.heads * self._model.head_dim / self._tp
        seconds: Floats = 4.0 * attended * width / self._attention_flops
        return seconds

    def _cache_s(self, kv_tokens: Floats) -> Floats:
        width = 2 * max(1.0, self._model.kv_heads / self._tp) * self._model.head_dim
        seconds: Floats = kv_tokens * width * self._kv_wide / self._kv_bandwidth
        return seconds

    def _all_reduce_s(self, tokens: Floats) -> Floats | float:
        tp = self._tp
        if tp == 1:
            return 0.0
        crowd = (2.0 / tp) ** self._fit.all_reduce_crowding
        moved = 2.0 * (tp - 1) / tp * tokens * self._model.hidden * self._wide
        seconds: Floats = 2.0 * (
            self._fit.all_reduce_latency_s * np.log2(tp)
            + moved / (self._link.bandwidth * self._fit.all_reduce * crowd)
        )
        return seconds
