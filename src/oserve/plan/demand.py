"""The demand of a plan: workload types with rates, from a trace or from given rates."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from oserve.core import LengthClass, OServeError, WorkloadType
from oserve.traces import TraceRequest
from oserve.workload.classes import class_mixes, length_classes
from oserve.workload.columns import Columns, columns_of
from oserve.workload.model import LengthQuantiles, TypeStatistics, WorkloadModel
from oserve.workload.rates import mean_rates, workload_types
from oserve.workload.types import fit_types

# Enough for a P99 of each type.
SAMPLES = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """Workload types with their rates, and the length classes that a router can distinguish.

    ``longest_tokens``: total length of the longest request that a replica must hold, by type.
    ``class_mix[class][type]`` is the share of a type among the requests of a class (each class sums
    to 1). ``centres``: centres of the types, (prompt, output) in tokens. ``notes``: what was
    changed or left out, in words. ``samples``: lengths of some requests of each type, (prompt,
    output) in tokens; empty where only the types are known. ``tiers``: the names of all tiers.
    """

    types: tuple[WorkloadType, ...]
    longest_tokens: dict[str, float]
    classes: tuple[LengthClass, ...]
    class_mix: dict[str, dict[str, float]]
    source: str
    centres: dict[str, tuple[float, float]]
    notes: tuple[str, ...] = ()
    samples: dict[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    tiers: tuple[str, ...] = ()

    @property
    def rate_rps(self) -> float:
        """Total requests per second."""
        return sum(kind.arrival_rate_rps for kind in self.types)


def demand_from_trace(
    requests: Iterable[TraceRequest],
    *,
    source: str,
    max_model_len: int,
    k: int | None = None,
    rate_scale: float = 1.0,
    seed: int = 0,
) -> Demand:
    """Types by k-means and their mean rates over the trace, times ``rate_scale``.

    Requests longer than the context count as truncated to it, at the expense of the prompt. Raises
    OServeError for a trace without requests.
    """
    columns = columns_of(requests)
    count = len(columns.arrival_s)
    if not count:
        raise OServeError(
            "zero traffic: the trace has no requests",
            place=source,
            remedy="give a trace with requests",
        )
    output = np.minimum(columns.output_tokens, max(1, max_model_len - 1))
    cut = int(np.sum(columns.prompt_tokens + output > max_model_len))
    prompt = np.maximum(1.0, np.minimum(columns.prompt_tokens, max_model_len - output))
    fitted = Columns(arrival_s=columns.arrival_s, prompt_tokens=prompt, output_tokens=output)
    notes = []
    if cut:
        notes.append(
            f"{cut:,} of {count:,} requests ({cut / count:.0%}) are longer than the "
            f"context of {max_model_len:,} tokens; they count as cut to it"
        )
    if count == 1:
        notes.append("the trace has one request: its rate is taken as one a second")
    model = fit_types(prompt, output, k=k, seed=seed)
    index = model.assign(prompt, output)
    rates = mean_rates(columns.arrival_s, index, model.k) * rate_scale
    found = _demand(model, rates.tolist(), source=source, notes=tuple(notes), requests=fitted)
    # No request has both the longest prompt and the longest answer.
    longest = {
        name: min(tokens, float(max_model_len)) for name, tokens in found.longest_tokens.items()
    }
    return replace(found, longest_tokens=longest, samples=_samples(model, fitted, index, seed))


def _samples(
    model: WorkloadModel, requests: Columns, index: "np.ndarray[Any, Any]", seed: int
) -> dict[str, tuple[tuple[int, int], ...]]:
    """Lengths of at most ``SAMPLES`` requests of each type."""
    draw = np.random.default_rng(seed)
    found = {}
    for kind, name in enumerate(model.names):
        mine = np.flatnonzero(index == kind)
        if len(mine) > SAMPLES:
            mine = np.sort(draw.choice(mine, SAMPLES, replace=False))
        prompt = np.rint(requests.prompt_tokens[mine]).astype(int).tolist()
        output = np.rint(np.maximum(1.0, requests.output_tokens[mine])).astype(int).tolist()
        found[name] = tuple(zip(prompt, output, strict=True))
    return found


def demand_from_rates(types: Sequence[WorkloadType], *, source: str, max_model_len: int) -> Demand:
    """The demand of given types. Raises OServeError for one that exceeds the context."""
    for kind in types:
        if kind.prompt_tokens + kind.output_tokens > max_model_len:
            raise OServeError(
                f"{kind.name!r} takes {kind.prompt_tokens + kind.output_tokens:,.0f} tokens, "
                f"the model's context is {max_model_len:,}",
                place=source,
                remedy="give shorter lengths, another model, or --max-model-len",
            )
    ordered = sorted(types, key=lambda kind: (kind.prompt_tokens, kind.output_tokens))
    total = sum(kind.arrival_rate_rps for kind in ordered)
    model = WorkloadModel(
        types=tuple(
            TypeStatistics(
                name=kind.name,
                centre=(math.log1p(kind.prompt_tokens), math.log1p(kind.output_tokens)),
                share=kind.arrival_rate_rps / total,
                prompt_tokens=kind.prompt_tokens,
                output_tokens=kind.output_tokens,
                prompt_quantiles=_same(kind.prompt_tokens),
                output_quantiles=_same(kind.output_tokens),
            )
            for kind in ordered
        )
    )
    found = _demand(model, [kind.arrival_rate_rps for kind in ordered], source=source, notes=())
    own = {kind.name: kind.tier for kind in ordered}
    return replace(found, types=tuple(replace(kind, tier=own[kind.name]) for kind in found.types))


def scaled(demand: Demand, factor: float) -> Demand:
    """The same mix at ``factor`` times the rate."""
    types = tuple(
        replace(kind, arrival_rate_rps=kind.arrival_rate_rps * factor) for kind in demand.types
    )
    return replace(demand, types=types)


def _demand(
    model: WorkloadModel,
    rates_rps: list[float],
    *,
    source: str,
    notes: tuple[str, ...],
    requests: Columns | None = None,
) -> Demand:
    classes, class_of = length_classes(model, rates_rps, requests=requests)
    if requests is None:
        members = [[class_of[kind] == item.name for kind in model.names] for item in classes]
        mixes = np.array(members) * np.maximum(rates_rps, 1e-12)
        mixes = mixes / mixes.sum(axis=1, keepdims=True)
    else:
        mixes = class_mixes(classes, model, requests)
    return Demand(
        types=workload_types(model, rates_rps),
        longest_tokens={
            kind.name: kind.prompt_quantiles.p99 + kind.output_quantiles.p99 for kind in model.types
        },
        classes=classes,
        class_mix={
            item.name: dict(zip(model.names, row, strict=True))
            for item, row in zip(classes, mixes.tolist(), strict=True)
        },
        source=source,
        centres={
            kind.name: (math.expm1(kind.centre[0]), math.expm1(kind.centre[1]))
            for kind in model.types
        },
        notes=notes,
    )


def _same(tokens: float) -> LengthQuantiles:
    return LengthQuantiles(p50=tokens, p95=tokens, p99=tokens)
