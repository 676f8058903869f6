"""The demand a plan is made for: workload types with rates, from a trace or from given rates."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from oserve.core import LengthClass, OServeError, WorkloadType
from oserve.traces import TraceRequest
from oserve.workload.classes import length_classes
from oserve.workload.model import LengthQuantiles, TypeStatistics, WorkloadModel
from oserve.workload.rates import mean_rates, workload_types
from oserve.workload.types import fit_types


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """``longest_tokens``: prompt and output, by type, of the longest request a replica must hold.

    ``classes`` is what a router can tell of a type by the prompt alone; ``class_of`` maps type
    names to theirs. ``notes`` say in words what was changed or left out.
    """

    types: tuple[WorkloadType, ...]
    longest_tokens: dict[str, float]
    classes: tuple[LengthClass, ...]
    class_of: dict[str, str]
    source: str
    notes: tuple[str, ...] = ()

    @property
    def rate_rps(self) -> float:
        """Requests per second of all types."""
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

    Requests longer than the context are counted as cut to it: the prompt gives way, as far as it
    must. Raises OServeError for a trace without requests.
    """
    rows = [(r.arrival_s, r.prompt_tokens, r.output_tokens) for r in requests]
    if not rows:
        raise OServeError(
            "zero traffic: the trace has no requests",
            place=source,
            remedy="give a trace with requests",
        )
    arrival_s, prompt, output = np.array(rows, dtype=np.float64).T
    output = np.minimum(output, max(1, max_model_len - 1))
    cut = int(np.sum(prompt + output > max_model_len))
    prompt = np.maximum(1.0, np.minimum(prompt, max_model_len - output))
    notes = []
    if cut:
        notes.append(
            f"{cut:,} of {len(rows):,} requests ({cut / len(rows):.0%}) are longer than the "
            f"context of {max_model_len:,} tokens; they count as cut to it"
        )
    if len(rows) == 1:
        notes.append("the trace has one request: its rate is taken as one a second")
    model = fit_types(prompt, output, k=k, seed=seed)
    index = model.assign(prompt, output)
    rates = mean_rates(arrival_s, index, model.k) * rate_scale
    return _demand(model, rates.tolist(), source=source, notes=tuple(notes))


def demand_from_rates(types: Sequence[WorkloadType], *, source: str, max_model_len: int) -> Demand:
    """Types as given. Raises OServeError for one that the context does not hold."""
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
    return _demand(model, [kind.arrival_rate_rps for kind in ordered], source=source, notes=())


def scaled(demand: Demand, factor: float) -> Demand:
    """The same mix at ``factor`` times the rate."""
    types = tuple(
        replace(kind, arrival_rate_rps=kind.arrival_rate_rps * factor) for kind in demand.types
    )
    return replace(demand, types=types)


def _demand(
    model: WorkloadModel, rates_rps: list[float], *, source: str, notes: tuple[str, ...]
) -> Demand:
    classes, class_of = length_classes(model, rates_rps)
    return Demand(
        types=workload_types(model, rates_rps),
        longest_tokens={
            kind.name: kind.prompt_quantiles.p99 + kind.output_quantiles.p99 for kind in model.types
        },
        classes=classes,
        class_of=class_of,
        source=source,
        notes=notes,
    )


def _same(tokens: float) -> LengthQuantiles:
    return LengthQuantiles(p50=tokens, p95=tokens, p99=tokens)
