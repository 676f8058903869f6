"""What the transfer of a model's files from node to node asks and tells.

Queries go to the examiners of nodes, as JSON lines; see ``examination``. Between two examiners goes
one connection through the sender's hatch: for each file a ``FileWish``, a ``FileHead``, the bytes,
and a ``FileTail``.
"""

from typing import Annotated, Final

import msgspec

from oserve.core import HatchAddress
from oserve.nodes.examination import FactsQuery, FileName, LinkQuery, ModelFiles, TimeQuery

_Natural = Annotated[int, msgspec.Meta(ge=0)]


# -- to the examiner of a node --------------------------------------------------------------------
class HoldingsQuery(msgspec.Struct, frozen=True, kw_only=True, tag="Holdings"):
    """Ask for ``ModelHoldings``; ``model``: its folder or Hugging Face id."""

    model: str


class OfferQuery(msgspec.Struct, frozen=True, kw_only=True, tag="Offer"):
    """Have the node send the files of a model to whoever asks; answered by ``FilesOffered``."""

    model: str


class FetchQuery(msgspec.Struct, frozen=True, kw_only=True, tag="Fetch"):
    """Have the node fetch files of a model that it lacks.

    ``source``: the hatch of the node that offers them, at ``name`` there. ``files``: all files that
    the model has; ``revision``: see ``ModelHoldings``. Answered by ``FetchProgress`` once a second,
    then by ``FetchEnd``.
    """

    model: str
    source: HatchAddress
    name: str
    files: ModelFiles
    revision: str = ""


class ModelHoldings(msgspec.Struct, frozen=True, kw_only=True):
    """The files of a model on a node. ``complete``: an engine can start from them.

    ``revision``: of a model in the cache of downloads; empty for a folder. ``error``: why there are
    none.
    """

    files: ModelFiles = ()
    complete: bool = False
    revision: str = ""
    error: str = ""

    @property
    def size_bytes(self) -> int:
        """Of all files."""
        return sum(file.size_bytes for file in self.files)


class FilesOffered(msgspec.Struct, frozen=True, kw_only=True):
    """The node sends them; ``error``: why it does not."""

    error: str = ""


class FetchProgress(msgspec.Struct, frozen=True, kw_only=True, tag="Progress"):
    """Bytes that the node has of those that it lacked, and how many it lacked."""

    have_bytes: int
    all_bytes: int


class FetchEnd(msgspec.Struct, frozen=True, kw_only=True, tag="End"):
    """The node has all files, or ``error`` says why not.

    ``refused``: another try will not help, such as on a full disk. ``resumed_bytes``: that an
    earlier try had fetched; ``fetched_bytes``: that came now, in ``seconds``.
    """

    error: str = ""
    refused: bool = False
    resumed_bytes: int = 0
    fetched_bytes: int = 0
    seconds: float = 0.0


FetchAnswer = FetchProgress | FetchEnd

Query = FactsQuery | TimeQuery | LinkQuery | HoldingsQuery | OfferQuery | FetchQuery
QUERIES: Final[msgspec.json.Decoder[Query]] = msgspec.json.Decoder(Query)
"""All that the examiner of a node is asked."""


# -- from node to node ----------------------------------------------------------------------------
class FileWish(msgspec.Struct, frozen=True, kw_only=True):
    """Ask for a file from ``offset`` on; ``prefix``: the SHA-256 of the bytes before."""

    model: str
    file: FileName
    offset: _Natural = 0
    prefix: str = ""


class FileHead(msgspec.Struct, frozen=True, kw_only=True):
    """The bytes from ``offset`` to ``size_bytes`` follow, then ``FileTail``.

    The offset is 0 if the bytes before are others than those wished for. ``error``: none follow.
    """

    size_bytes: _Natural = 0
    offset: _Natural = 0
    error: str = ""


class FileTail(msgspec.Struct, frozen=True, kw_only=True):
    """The SHA-256 of the whole file."""

    sha256: str
