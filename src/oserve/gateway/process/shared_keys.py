"""The key file as the hub sends it to gateway processes on other nodes, which have no such file."""

import hashlib
from pathlib import Path

import msgspec

from oserve.gateway.access.key_file import KeyFile
from oserve.gateway.access.keys import KeyDocument

_INTERVAL_S = 0.5


class SharedKeys:
    """The last keys read, and their version; "" before there is a key file.

    Raises OServeError if the file cannot be used. One that is damaged or vanishes later leaves the
    last keys in force (see ``KeyFile``).
    """

    def __init__(self, path: Path) -> None:
        self.version = ""
        self._document: KeyDocument | None = None
        self._next_s = 0.0
        self._file = KeyFile(path, self._changed)
        self._file.check()

    def _changed(self, document: KeyDocument) -> None:
        self._document = document
        self.version = hashlib.blake2b(msgspec.json.encode(document), digest_size=16).hexdigest()

    def newer(self, version: str, now_s: float) -> KeyDocument | None:
        """What a process needs that has this version; ``None``: nothing.

        Looks at the file again twice a second. Once there are keys they are never taken back.
        """
        if now_s >= self._next_s:
            self._next_s = now_s + _INTERVAL_S
            self._file.check()
        return self._document if version != self.version else None
