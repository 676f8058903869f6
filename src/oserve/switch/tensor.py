"""Tensors of a model as one device would hold them, and how ranks share them.

A *tensor* is logical and whole (``q`` of a layer); a *parameter* is what an engine calls by name
and may fuse several tensors (``qkv_proj.weight``). Boxes are half-open index ranges, one per
dimension.
"""

from dataclasses import dataclass
from enum import StrEnum
from math import prod

from oserve.core import OServeError

Range = tuple[int, int]
Box = tuple[Range, ...]

# vLLM pads vocabularies to a multiple of this (DEFAULT_VOCAB_PADDING_SIZE).
VOCABULARY_PADDING = 64


class CutKind(StrEnum):
    """How the ranks of a tensor-parallel group share a dimension.

    ``EVEN``: equal parts. ``KV_HEADS``: equal parts, or each head on several ranks where there are
    more ranks than heads. ``VOCABULARY``: equal parts of the padded size, the padding on the last.
    ``EXPERTS``: nearly equal parts, the first ranks have one more. ``WHOLE``: every rank has all.
    """

    WHOLE = "whole"
    EVEN = "even"
    KV_HEADS = "kv_heads"
    VOCABULARY = "vocabulary"
    EXPERTS = "experts"


class Where(StrEnum):
    """Which pipeline stages have a tensor; ``LAYER``: there is one for each layer."""

    LAYER = "layer"
    FIRST = "first"
    LAST = "last"
    ENDS = "ends"
    EVERY = "every"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Dimension ``dim`` is made of ``units`` equal units (heads, groups, rows), each kept whole."""

    kind: CutKind = CutKind.WHOLE
    dim: int = 0
    units: int = 1

    def range_of(self, size: int, rank: int, ranks: int) -> tuple[int, int, int]:
        """Return start and stop of the rank's part of ``size`` indices, and its local length.

        The local length exceeds the part only by vocabulary padding. Raises OServeError where the
        engine could not cut it either.
        """
        match self.kind:
            case CutKind.WHOLE:
                return 0, size, size
            case CutKind.VOCABULARY:
                padded = -(-size // VOCABULARY_PADDING) * VOCABULARY_PADDING
                each = self._even(padded, ranks)
                start = min(size, rank * each)
                return start, min(size, start + each), each
            case CutKind.EXPERTS:
                base, more = divmod(self.units, ranks)
                first = rank * base + min(rank, more)
                each = size // self.units
                count = base + (rank < more)
                return first * each, (first + count) * each, count * each
            case CutKind.KV_HEADS if ranks >= self.units:
                replicas = self._even(ranks, self.units)
                each = size // self.units
                head = rank // replicas
                return head * each, (head + 1) * each, each
            case _:
                each = self._even(self.units, ranks) * (size // self.units)
                return rank * each, (rank + 1) * each, each

    def _even(self, units: int, ranks: int) -> int:
        if units % ranks:
            raise OServeError(
                f"{units} {self.kind} units cannot be cut into {ranks} equal parts",
                place="shape.tensor_parallel_size",
                remedy="choose a size that divides heads, widths and quantisation groups",
            )
        return units // ranks


WHOLE = Cut()


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One logical tensor; if ``where`` is LAYER, one like it in each layer.

    ``shape`` is of one layer. ``dtype`` names the type of its values, each ``value_bytes`` long
    (packed values count as the word they are packed in). ``scheme`` names the quantisation it
    belongs to. With ``experts`` dimension 0 counts experts, which expert parallelism cuts instead
    of ``cut``.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    value_bytes: int
    cut: Cut = WHOLE
    scheme: str = ""
    experts: bool = False
    where: Where = Where.LAYER

    @property
    def key(self) -> tuple[str, str, str]:
        """Tensors of equal key hold equal values in every layout."""
        return self.name, self.dtype, self.scheme

    def box_of(self, rank: int, ranks: int, *, expert_parallel: bool) -> tuple[Box, int, int]:
        """Return the rank's box in one layer's tensor, the cut dimension and its local length."""
        cut = self.cut
        if expert_parallel and self.experts:
            cut = Cut(kind=CutKind.EXPERTS, dim=0, units=self.shape[0])
        start, stop, length = cut.range_of(self.shape[cut.dim], rank, ranks)
        box = tuple(
            (start, stop) if dim == cut.dim else (0, size) for dim, size in enumerate(self.shape)
        )
        return box, cut.dim, length


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """A parameter by the engine's name (``{}`` stands for the layer): parts joined along a dim."""

    name: str
    parts: tuple[TensorSpec, ...]
    fuse_dim: int = 0

    @property
    def where(self) -> Where:
        """All parts are in the same stages."""
        return self.parts[0].where


def intersect(one: Box, other: Box) -> Box | None:
    """Return what two boxes share, or None."""
    shared = tuple((max(a[0], b[0]), min(a[1], b[1])) for a, b in zip(one, other, strict=True))
    return shared if all(start < stop for start, stop in shared) else None


def volume(box: Box) -> int:
    """Return the number of values in a box."""
    return prod(stop - start for start, stop in box)
