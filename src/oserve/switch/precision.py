"""The parameters of a model at a precision: linear layers with their scales, the rest plain.

As vLLM creates them for compressed-tensors checkpoints, before a kernel repacks them
(vllm/model_executor/layers/quantization/compressed_tensors): int8 with one scale per output
channel, fp8 with one scale per fused matrix, int4 packed eight to a word with one scale per group
of inputs. An int4 ``weight_shape`` describes a rank's own part: it never moves.
"""

import functools
from dataclasses import dataclass, replace

from oserve.core import OServeError, Precision
from oserve.perf.model import ModelFacts
from oserve.switch.family import Family, Linear, Output, Plain, members_of
from oserve.switch.tensor import WHOLE, Cut, CutKind, Parameter, TensorSpec, Where

PLAIN_BYTES = {Precision.FP32: 4, Precision.BF16: 2, Precision.FP16: 2}
_PACKED = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFormat:
    """How weights are held: linear layers in ``precision``, the rest in ``plain``.

    ``group_size`` inputs share a scale in int4.
    """

    precision: Precision = Precision.BF16
    plain: Precision = Precision.BF16
    group_size: int = 128

    @property
    def quantised(self) -> bool:
        """Whether linear layers have scales."""
        return self.precision not in PLAIN_BYTES

    @property
    def unquantised(self) -> "WeightFormat":
        """The format that this one can be made from."""
        return WeightFormat(precision=self.plain, plain=self.plain)


def format_of(precision: Precision, *, plain: Precision = Precision.BF16) -> WeightFormat:
    """Return the format of a replica; ``plain`` matters for quantised precisions only."""
    return WeightFormat(precision=precision, plain=precision if precision in PLAIN_BYTES else plain)


@functools.lru_cache(maxsize=64)
def parameters_of(model: ModelFacts, family: Family, held: WeightFormat) -> tuple[Parameter, ...]:
    """Return all parameters of the model in a format. Raises OServeError if it does not fit."""
    found: list[Parameter] = []
    for member in members_of(model, family):
        if isinstance(member, Plain):
            found.append(_plain(member, held))
            continue
        found.extend(_QUANTISERS.get(held.precision, _weight)(member, held))
        if member.bias:
            found.append(_bias(member, held))
    return tuple(found)


def _plain(member: Plain, held: WeightFormat) -> Parameter:
    tensor = TensorSpec(
        name=member.name,
        shape=member.shape,
        dtype=held.plain.value,
        value_bytes=PLAIN_BYTES[held.plain],
        cut=member.cut,
        where=member.where,
    )
    return Parameter(name=member.name, parts=(tensor,))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Values:
    """The type of a tensor's values, their bytes, and the quantisation they belong to."""

    dtype: str
    size: int
    scheme: str = ""


def _part(
    layer: Linear, output: Output, suffix: str, shape: tuple[int, ...], cut: Cut, values: _Values
) -> TensorSpec:
    """``shape`` and ``cut`` as of one expert, where there are experts."""
    name = f"{layer.stem}{suffix}" + (f"#{output.name}" if output.name else "")
    if layer.experts:
        shape = (layer.experts, *shape)
        cut = cut if cut.kind is CutKind.WHOLE else replace(cut, dim=cut.dim + 1)
    return TensorSpec(
        name=name,
        shape=shape,
        dtype=values.dtype,
        value_bytes=values.size,
        cut=cut,
        scheme=values.scheme,
        experts=layer.experts > 0,
        where=Where.LAYER,
    )


def _fused(layer: Linear, suffix: str, parts: list[TensorSpec]) -> Parameter:
    fuse_dim = 1 if layer.experts and len(parts) > 1 else 0
    return Parameter(name=layer.stem + suffix, parts=tuple(parts), fuse_dim=fuse_dim)


def _matrix(layer: Linear, suffix: str, columns: int, units: int, values: _Values) -> Parameter:
    """[rows, columns] of each output; ranks share ``units`` of columns if row-parallel."""
    across = Cut(kind=CutKind.EVEN, dim=1, units=units)
    parts = [
        _part(
            layer,
            output,
            suffix,
            (output.rows, columns),
            across if layer.row_parallel else output.cut,
            values,
        )
        for output in layer.outputs
    ]
    return _fused(layer, suffix, parts)


def _weight(layer: Linear, held: WeightFormat) -> list[Parameter]:
    return [_matrix(layer, "weight", layer.inputs, layer.input_units, _plain_values(held))]


def _plain_values(held: WeightFormat, scheme: str = "") -> _Values:
    return _Values(dtype=held.plain.value, size=PLAIN_BYTES[held.plain], scheme=scheme)


def _int8(layer: Linear, held: WeightFormat) -> list[Parameter]:
    values = _Values(dtype="int8", size=1, scheme="int8")
    factors = _Values(dtype="fp32", size=4, scheme="int8")
    scales = [
        # A row-parallel layer's scales are per row, and every rank has all rows.
        _part(layer, output, "weight_scale", (output.rows, 1), output.cut, factors)
        for output in layer.outputs
    ]
    return [
        _matrix(layer, "weight", layer.inputs, layer.input_units, values),
        _fused(layer, "weight_scale", scales),
    ]


def _fp8(layer: Linear, held: WeightFormat) -> list[Parameter]:
    values = _Values(dtype="fp8", size=1, scheme="fp8")
    factors = _Values(dtype="fp32", size=4, scheme="fp8")
    # Experts of one matrix have a vector of scales, of several a row of them each.
    shape: tuple[int, ...] = () if layer.experts and len(layer.outputs) == 1 else (1,)
    scales = [
        _part(layer, output, "weight_scale", shape, WHOLE, factors) for output in layer.outputs
    ]
    return [
        _matrix(layer, "weight", layer.inputs, layer.input_units, values),
        _fused(layer, "weight_scale", scales),
    ]


def _int4(layer: Linear, held: WeightFormat) -> list[Parameter]:
    groups, rest = divmod(layer.inputs, held.group_size)
    if rest or held.group_size % _PACKED:
        raise OServeError(
            f"{layer.inputs} inputs of {layer.stem} are no whole number of groups of "
            f"{held.group_size}",
            place="shape.precision",
            remedy="choose another precision or group size",
        )
    scheme = f"int4-{held.group_size}"
    values = _Values(dtype="int32", size=4, scheme=scheme)
    return [
        _matrix(layer, "weight_packed", layer.inputs // _PACKED, groups, values),
        _matrix(layer, "weight_scale", groups, groups, _plain_values(held, scheme)),
    ]


def _bias(layer: Linear, held: WeightFormat) -> Parameter:
    parts = [
        # vLLM adds it after the sum over ranks, so each rank has a row-parallel layer's whole bias.
        _part(layer, output, "bias", (output.rows,), output.cut, _plain_values(held))
        for output in layer.outputs
    ]
    return _fused(layer, "bias", parts)


_QUANTISERS = {Precision.INT8: _int8, Precision.FP8: _fp8, Precision.INT4: _int4}
