"""What a server remembers of its nodes, so that the next one reaches them though nobody tells.

The file holds tokens: it is readable for its user alone, in a folder that is, too.
"""

import logging
import os
import secrets
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import msgspec

from oserve.engines.holding import ServerOwner
from oserve.nodes.directory import ClusterNode
from oserve.nodes.hatch_identity import write_private

_log = logging.getLogger("oserve.nodes")

_FILE = "known.json"
_OWNER_FILE = "server"


class _Known(msgspec.Struct, frozen=True, kw_only=True):
    cluster: str
    nodes: tuple[ClusterNode, ...]


_KNOWN_DECODER = msgspec.json.Decoder(_Known)


class KnownNodes:
    """The nodes of one cluster, as ``cluster.nodes`` names it, in a folder of the state folder."""

    def __init__(self, folder: Path, cluster: str) -> None:
        self._folder = folder
        self._cluster = cluster
        self._failed = False

    def read(self) -> dict[str, ClusterNode]:
        """The nodes that were reached before, by name; none if others were named."""
        try:
            known = _KNOWN_DECODER.decode((self._folder / _FILE).read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, msgspec.DecodeError) as error:
            _log.warning("the nodes that were known before cannot be read: %s", _plain(error))
            return {}
        if known.cluster != self._cluster:
            return {}
        return {node.name: replace(node, lost="", refused="") for node in known.nodes}

    def write(self, nodes: Mapping[str, ClusterNode]) -> None:
        """Remember those that were reached. A full disk is logged once, and ends nothing."""
        reached = tuple(nodes[name] for name in sorted(nodes) if nodes[name].hatch is not None)
        known = _Known(cluster=self._cluster, nodes=reached)
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_private(self._folder / _FILE, msgspec.json.encode(known))
        except OSError as error:
            if not self._failed:
                _log.warning("the nodes cannot be remembered: %s", _plain(error))
            self._failed = True


class KnownDirectory:
    """The nodes that a server has reached, for a visitor: nothing is asked and nothing ordered."""

    def __init__(self, nodes: dict[str, ClusterNode]) -> None:
        self.nodes = nodes
        self.silent = ""

    async def start(self) -> None:
        """See ``NodeDirectory.start``."""

    async def close(self, *, end_nodes: bool) -> None:
        """See ``NodeDirectory.close``: the nodes are the server's."""


def server_owner(state_dir: Path, folder: Path) -> ServerOwner:
    """The server of a state folder, as nodes are to know it; its key is kept in ``folder``.

    Without a folder to write to it is another one at each start, and waits until nodes are free.
    """
    title = f"{os.uname().nodename}:{state_dir.resolve()}"
    file = folder / _OWNER_FILE
    try:
        return ServerOwner(key=file.read_text(encoding="ascii").strip() or title, title=title)
    except (OSError, UnicodeDecodeError):
        key = secrets.token_hex(16)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_private(file, f"{key}\n".encode())
    except OSError as error:
        _log.warning("this server's name for nodes cannot be kept: %s", _plain(error))
    return ServerOwner(key=key, title=title)


def _plain(error: Exception) -> str:
    """What went wrong, without what the file holds."""
    return getattr(error, "strerror", None) or "it is not what this version writes"
