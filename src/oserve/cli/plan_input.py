"""The input of ``oserve plan``, from its options. Bad input raises OServeError."""

import asyncio
import math
from collections.abc import Mapping, Sequence

from oserve.cli.options import TraceSelection, check_over_zero, read_requests
from oserve.config import ClusterSpec, load_cluster, load_rates
from oserve.config.cluster import lists_hosts, load_hosts, named_network
from oserve.config.policies import ladder_goal
from oserve.config.settings import PlanningSettings
from oserve.control.ladder import Goal
from oserve.core import Objective, OServeError
from oserve.engines.devices import find_devices
from oserve.nodes.host_cluster import asked_devices
from oserve.nodes.ray_address import is_ray, ray_address
from oserve.nodes.ray_cluster import check_ray_installed, listed_devices
from oserve.perf.capacity import LatencyLimits
from oserve.perf.source import DEFAULT_NETWORK
from oserve.plan.demand import Demand, demand_from_rates, demand_from_trace, scaled
from oserve.traces import TraceRequest


def cluster_from(text: str | None) -> ClusterSpec:
    """The cluster of ``--cluster``; this machine's devices without it.

    The nodes of a Ray cluster, and hosts of a file, are asked.
    """
    if text is None:
        return ClusterSpec(devices=find_devices())
    if is_ray(text):
        check_ray_installed()
        return ClusterSpec(devices=asyncio.run(listed_devices(ray_address(text))))
    if lists_hosts(text):
        devices = asyncio.run(asked_devices(load_hosts(text)))
        return ClusterSpec(devices=devices, network=named_network(text) or DEFAULT_NETWORK)
    return load_cluster(text)


def demand_from(
    trace: str | None,
    rates: str | None,
    wish: TraceSelection,
    *,
    max_model_len: int,
    k: int | None,
    rate_scale: float,
    seed: int,
) -> tuple[Demand, list[TraceRequest]]:
    """The demand, and the requests of its trace if there is one."""
    if trace is not None and rates is None:
        requests = read_requests(trace, wish)
        demand = demand_from_trace(
            requests,
            source=trace,
            max_model_len=max_model_len,
            k=k,
            rate_scale=rate_scale,
            seed=seed,
        )
        return demand, requests
    if rates is not None and trace is None:
        demand = demand_from_rates(load_rates(rates), source="--rates", max_model_len=max_model_len)
        return scaled(demand, rate_scale), []
    raise OServeError(
        "the traffic must come from a trace or from --rates, and from exactly one of them",
        place="--trace",
        remedy="name a trace file, or give --rates 512x128=3.5",
    )


def sizes_from(option: str, text: str | None) -> tuple[int, ...]:
    """The counts of ``1,2,4``, sorted; none without a text."""
    if text is None:
        return ()
    try:
        sizes = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        sizes = ()
    if not sizes or sizes[0] < 1:
        raise OServeError(
            f"{text!r} is not a list of counts", place=option, remedy="for example 1,2,4"
        )
    return sizes


def limits_from(
    demand: Demand, ttft_ms: float | None, tpot_ms: float | None, own: Sequence[str]
) -> dict[str, LatencyLimits]:
    """The limits of each type: its own of ``--slo``, else the common ones."""

    def seconds(value: float | None) -> float | None:
        return None if value is None else value / 1e3

    common = LatencyLimits(ttft_s=seconds(ttft_ms), tpot_s=seconds(tpot_ms))
    limits = {kind.name: common for kind in demand.types}
    for text in own:
        name, equals, values = text.rpartition("=")
        first, slash, second = values.partition("/")
        if not equals or not slash or name not in limits:
            known = ", ".join(repr(kind) for kind in limits)
            raise OServeError(
                f"{text!r} names no type and limits",
                place="--slo",
                remedy=f"write NAME=TTFT_MS/TPOT_MS; the types are {known}",
            )
        limits[name] = LatencyLimits(
            ttft_s=seconds(_milliseconds(first)), tpot_s=seconds(_milliseconds(second))
        )
    return limits


def _milliseconds(text: str) -> float | None:
    if text.strip() == "-":
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    check_over_zero(slo=value)
    return value


def goal_from(
    demand: Demand, objective: Objective | None, own: Sequence[str], attainment: float
) -> Goal:
    """The objective of each type: its own of ``--type-objective``, else ``objective``."""
    objectives = {}
    for text in own:
        name, equals, value = text.rpartition("=")
        if not equals or value not in set(Objective):
            raise OServeError(
                f"{text!r} names no type and objective",
                place="--type-objective",
                remedy="write NAME=OBJECTIVE; the objectives are " + ", ".join(Objective),
            )
        objectives[name] = Objective(value)
    settings = PlanningSettings(
        objective=objective or Objective.LATENCY, type_objectives=objectives, attainment=attainment
    )
    names = [kind.name for kind in demand.types]
    return ladder_goal(settings, names, place="--type-objective")


def check_objective(
    objective: Objective | None, *, ladder: bool, attainment: float, given: Mapping[str, object]
) -> None:
    """Check what the ladder is asked for; ``given``: options that need a ladder, by name."""
    if not 0 < attainment <= 1:
        raise OServeError(
            f"it is {attainment:g}",
            place="--attainment",
            remedy="give a share over 0, at most 1: 0.95 is 95 %",
        )
    if ladder:
        return
    asked = [option for option, value in given.items() if value]
    if objective not in {None, Objective.CAPACITY}:
        asked.append("--objective")
    if asked:
        raise OServeError(
            "without a ladder the plan is the one of most capacity",
            place=asked[0],
            remedy="leave out --no-ladder, or this option",
        )


def check_at_least_one(**values: float | None) -> None:
    """Raise OServeError for an option that is not a finite number of at least 1."""
    for name, value in values.items():
        if value is not None and not (math.isfinite(value) and value >= 1):
            raise OServeError(
                f"it is {value:g}",
                place=f"--{name.replace('_', '-')}",
                remedy="give a number of at least 1",
            )
