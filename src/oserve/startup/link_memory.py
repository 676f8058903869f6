"""The measured links between nodes, kept in the state file for the next server."""

from pathlib import Path

import msgspec

from oserve.core import OServeError
from oserve.nodes.link_book import MeasuredLink
from oserve.startup.store import StateStore, StateUpdate

_NAME = "links"


class LinkMemory:
    """``file``: the state file; it is made with the first links."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def read(self) -> tuple[MeasuredLink, ...]:
        """What an earlier server has measured."""
        if not self._file.is_file():
            return ()
        try:
            return StateStore(self._file).saved(_NAME, tuple[MeasuredLink, ...]) or ()
        except OServeError:
            return ()

    def write(self, links: tuple[MeasuredLink, ...]) -> None:
        """Keep them. Where that is not possible they are measured again."""
        try:
            StateStore(self._file).save(StateUpdate(memory={_NAME: msgspec.json.encode(links)}))
        except OServeError:
            return
