"""The part of a transfer plan that one rank carries out. Plain data, which engines read too."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple


class ShardPart(NamedTuple):
    """A box of a parameter: start and stop in each dimension of the rank's own tensor."""

    parameter: str
    box: tuple[tuple[int, int], ...]


class StagedTensor(NamedTuple):
    """The shape and type (as ``bf16``) in which a parameter arrives that is then converted."""

    shape: tuple[int, ...]
    dtype: str


class ShardConversion(NamedTuple):
    """How a staged parameter is converted. ``peers``: ranks that hold parts of the same rows."""

    parameter: str
    scheme: Literal["int8", "cast"]
    peers: tuple[int, ...]


@dataclass(kw_only=True)
class RankOrder:
    """What one rank of a replica sends, receives and converts; peers are numbers of ranks.

    Ranks are numbered through all engines of the transfer. ``sends`` and ``receives`` list parts by
    peer, in the order in which both ends carry them out. ``staged``: parameters that arrive in
    another shape or type than the engine's; ``convert`` has one entry for each of them.
    """

    replica: str
    rank: int
    sends: dict[int, list[ShardPart]] = field(default_factory=dict)
    receives: dict[int, list[ShardPart]] = field(default_factory=dict)
    staged: dict[str, StagedTensor] = field(default_factory=dict)
    convert: list[ShardConversion] = field(default_factory=list)
