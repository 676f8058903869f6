"""The transfer plan: every byte that new replicas need, from a device that holds it, exactly once.

Bytes that the target device holds do not travel. A method chooses the other sources: the paper's
greedy one, or the balanced one (the default). If allowed, a replica of a quantised precision that
no source holds is filled from a plain one: the plain weights travel, and each target device
quantises what it received. Other traffic on the links is not known here.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from oserve.core import OServeError, Precision
from oserve.switch.balance import balanced_copies, lower_bound_s
from oserve.switch.choice import Copy, greedy_copies, local_copies, traffic_of
from oserve.switch.demand import Demands, demands_of
from oserve.switch.layout import Architecture, ShardPlacement, local_parameter
from oserve.switch.links import Links, LinkTraffic, busy_s, latency_s, local_s
from oserve.switch.precision import WeightFormat, format_of
from oserve.switch.tensor import CutKind, Parameter, Range


class Method(StrEnum):
    """How sources are chosen."""

    BALANCED = "balanced"
    GREEDY = "greedy"


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """A device quantises a parameter that arrived plain: its local part, in each of ``layers``.

    ``replica``: the replica that the device belongs to. ``cast``: the parameter only becomes a
    shorter float. Scales need the largest absolute values over the parts of all devices in
    ``peers``, the target among them; empty: its own part suffices.
    """

    replica: str
    target: str
    parameter: str
    layers: Range
    peers: tuple[str, ...] = ()
    cast: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferPlan:
    """Copies over links, copies inside devices (``kept``), conversions, and the time.

    ``busy_s`` is the busiest link's time; messages add ``latency_s`` at most. ``bound_s`` bounds
    the time of every choice of sources from below, latency aside. ``received``: the targets in the
    formats in which their weights arrive.
    """

    copies: tuple[Copy, ...]
    kept: tuple[Copy, ...]
    conversions: tuple[Conversion, ...]
    traffic: LinkTraffic
    busy_s: float
    latency_s: float
    bound_s: float
    received: tuple[ShardPlacement, ...] = ()

    @property
    def given_bytes(self) -> dict[str, int]:
        """Bytes by device, from others and from what it holds itself."""
        given: dict[str, int] = {}
        for copy in (*self.copies, *self.kept):
            given[copy.target] = given.get(copy.target, 0) + copy.item.size_bytes
        return given

    @property
    def seconds(self) -> float:
        """Predicted duration, on links that carry nothing else."""
        return self.busy_s + self.latency_s


def plan_transfer(
    architecture: Architecture,
    sources: Sequence[ShardPlacement],
    targets: Sequence[ShardPlacement],
    links: Links,
    *,
    method: Method = Method.BALANCED,
    quantise: bool = False,
) -> TransferPlan:
    """Return how the targets are filled from the sources, which do not change meanwhile.

    ``quantise`` allows a precision to be made from plain weights on the way. Raises OServeError,
    with the reason, if no source holds some byte.
    """
    for placed in (*sources, *targets):
        for device in placed.devices:
            links.port(device)
    wanted = [_received(target, sources, quantise=quantise) for target in targets]
    conversions = tuple(
        conversion
        for target, got in zip(targets, wanted, strict=True)
        if got is not target
        for conversion in _conversions(architecture, target, got)
    )
    demands = demands_of(architecture, sources, wanted)
    plan = plan_demands(demands, links, method=method, conversions=conversions)
    return replace(plan, received=tuple(wanted))


def plan_demands(
    demands: Demands,
    links: Links,
    *,
    method: Method = Method.BALANCED,
    conversions: tuple[Conversion, ...] = (),
) -> TransferPlan:
    """Choose sources for demands; return the plan with its time."""
    if method is Method.BALANCED:
        balanced = balanced_copies(demands.remote, links)
        copies, bound_s = balanced.copies, balanced.bound_s
    else:
        copies = greedy_copies(demands.remote, links)
        bound_s = lower_bound_s(demands.remote, links)
    kept = local_copies(demands)
    traffic = traffic_of((*copies, *kept))
    return TransferPlan(
        copies=copies,
        kept=kept,
        conversions=conversions,
        traffic=traffic,
        busy_s=busy_s(traffic, links),
        latency_s=latency_s(traffic.pairs, links),
        bound_s=max(bound_s, local_s(traffic.local, links)),
    )


def fill_reason(
    target: ShardPlacement, sources: Sequence[ShardPlacement], *, quantise: bool
) -> str:
    """Return why the target cannot be filled from these sources; empty if it can."""
    held = target.layout.held
    formats = {source.layout.held for source in sources}
    if held in formats:
        return ""
    if not formats:
        return "no replica is running to copy from"
    if _origin(held, formats) is None:
        if not held.quantised:
            return (
                f"no running replica holds {held.precision} weights, and others cannot be turned "
                "back"
            )
        return (
            f"no running replica holds {held.precision} weights, nor {held.plain} ones to make "
            "them from"
        )
    if not quantise:
        return f"{held.precision} weights would have to be made on the way, which is not allowed"
    return ""


def _origin(held: WeightFormat, formats: Collection[WeightFormat]) -> WeightFormat | None:
    """Return the plain format among these that it can be made from: its own, else fp32."""
    choices = (held.unquantised, format_of(Precision.FP32))
    return next((one for one in choices if one in formats and one != held), None)


def _received(
    target: ShardPlacement, sources: Sequence[ShardPlacement], *, quantise: bool
) -> ShardPlacement:
    """Return the target in the format in which its weights arrive. Raises OServeError."""
    held = target.layout.held
    formats = {source.layout.held for source in sources}
    if held in formats:
        return target
    reason = fill_reason(target, sources, quantise=quantise)
    origin = _origin(held, formats)
    if reason or origin is None:
        raise OServeError(
            f"replica {target.replica} cannot be filled: {reason}",
            place="switch",
            remedy="keep a source of its precision, allow quantising on the way, or reload",
        )
    return replace(target, layout=replace(target.layout, held=origin))


def _conversions(
    architecture: Architecture, target: ShardPlacement, got: ShardPlacement
) -> list[Conversion]:
    layout = target.layout
    width = layout.tensor_parallel_size
    own = {
        part.key for parameter in architecture.parameters(layout.held) for part in parameter.parts
    }
    plain = {
        parameter.name
        for parameter in architecture.parameters(layout.held)
        if not parameter.parts[0].scheme
    }
    _check_cuts(architecture, target)
    found: list[Conversion] = []
    for parameter in architecture.parameters(got.layout.held):
        if all(part.key in own for part in parameter.parts):
            continue
        stages = architecture.stages(parameter.where, layout.pipeline_parallel_size)
        cast = parameter.name in plain
        spans = not cast and _scale_spans_ranks(parameter, layout.held.precision, got)
        for stage, layers in stages:
            devices = target.devices[stage * width :][:width]
            shared = width > 1 and spans
            found.extend(
                Conversion(
                    replica=target.replica,
                    target=device,
                    parameter=parameter.name,
                    layers=layers,
                    peers=devices if shared else (),
                    cast=cast,
                )
                for device in devices
            )
    return found


def _check_cuts(architecture: Architecture, target: ShardPlacement) -> None:
    """Raise OServeError if ranks would cut through a group of weights that share a scale."""
    layout = target.layout
    for parameter in architecture.parameters(layout.held):
        local_parameter(
            parameter, 0, layout.tensor_parallel_size, expert_parallel=layout.expert_parallel
        )


def _scale_spans_ranks(parameter: Parameter, precision: Precision, got: ShardPlacement) -> bool:
    """Whether one scale covers values on several ranks."""
    part = parameter.parts[0]
    if part.experts and got.layout.expert_parallel:
        return False
    cut = part.cut.kind is not CutKind.WHOLE
    if precision is Precision.FP8:
        return cut
    across_inputs = part.cut.dim == len(part.shape) - 1
    return precision is Precision.INT8 and cut and across_inputs
