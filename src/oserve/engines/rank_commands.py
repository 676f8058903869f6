"""Commands to the ranks of an engine, and their replies: JSON in vLLM's control route.

vLLM passes strings to a method of every worker (``worker_extension``). Each rank decodes its own
command once and checks it; what it cannot read or do it answers with ``CommandRefused``.
"""

from typing import Annotated, Final, Literal, NamedTuple

import msgspec

from oserve.switch.rank_order import RankOrder, ShardPart

METHOD: Final = "oserve_command"
"""The worker's method that takes commands: a list of one for each rank, or of one for all."""

_PositiveSeconds = Annotated[float, msgspec.Meta(gt=0)]
_Rate = Annotated[float, msgspec.Meta(ge=0)]
_Rank = Annotated[int, msgspec.Meta(ge=0)]


# -- commands -------------------------------------------------------------------------------------
class DescribeLayout(msgspec.Struct, frozen=True, tag=True):
    """Reply with the shape and type of each parameter, as loaded (``LayoutReply``)."""


class OpenListener(msgspec.Struct, frozen=True, tag=True):
    """End any earlier job and listen for other ranks (``ListenerReply``)."""


class MoveShards(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Start carrying out ``order`` in the background.

    ``name``: of the transfer. ``number``: of this rank in it. ``addresses``: of all its ranks, by
    number. ``limit_s`` bounds the whole transfer, ``bytes_per_s`` what this rank sends and what it
    receives (0: no bound).
    """

    name: str
    number: _Rank
    addresses: list[str]
    limit_s: _PositiveSeconds
    order: RankOrder
    bytes_per_s: _Rate = 0.0


class SumShards(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Start computing checksums of parts in the background, one for each part.

    ``as_received``: of parts that were converted on arrival, as they were before.
    """

    name: str
    parts: list[ShardPart]
    as_received: bool = False


class ReportJob(msgspec.Struct, frozen=True, tag=True):
    """Reply with the state of the job started last (``JobReport``)."""


class TakeUpWeights(msgspec.Struct, frozen=True, tag=True):
    """Compute with the weights that have arrived. Blocks the engine while kernels repack them."""


class AbortJob(msgspec.Struct, frozen=True, tag=True):
    """End the job started last, and the listener."""


RankCommand = (
    DescribeLayout | OpenListener | MoveShards | SumShards | ReportJob | TakeUpWeights | AbortJob
)


# -- replies --------------------------------------------------------------------------------------
class ParameterLayout(NamedTuple):
    """Shape and type (as ``bfloat16``) of one parameter."""

    shape: tuple[int, ...]
    dtype: str


class LayoutReply(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The parameters of a rank, by name."""

    parameters: dict[str, ParameterLayout]


class ListenerReply(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The path of the socket at which the rank listens."""

    address: str


class JobReport(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The state of a background job; ``sums`` are there once it is done."""

    state: Literal["none", "running", "done", "failed"]
    name: str = ""
    reason: str = ""
    seconds: float = 0.0
    sent_bytes: int = 0
    received_bytes: int = 0
    sums: list[int] = []


class CommandDone(msgspec.Struct, frozen=True, tag=True):
    """The command was carried out, or its job was started."""


class CommandRefused(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The rank could not read the command, or could not do it."""

    reason: str


RankReply = LayoutReply | ListenerReply | JobReport | CommandDone | CommandRefused

COMMANDS: Final[msgspec.json.Decoder[RankCommand]] = msgspec.json.Decoder(RankCommand)
"""Reads a command. ``decode`` raises ``msgspec.DecodeError`` for one of another version."""

REPLIES: Final[msgspec.json.Decoder[RankReply]] = msgspec.json.Decoder(RankReply)
"""Reads a reply. ``decode`` raises ``msgspec.DecodeError`` for one of another version."""
