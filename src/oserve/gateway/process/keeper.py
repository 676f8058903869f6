"""The interface of the keepers that hold the gateway processes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from oserve.core import HatchAddress


class KeptProcess(Protocol):
    """A process that outlives the server that started it."""

    @property
    def pid(self) -> int: ...

    @property
    def stamp(self) -> str:
        """A fingerprint of the configuration at its start; empty if unknown."""
        ...

    @property
    def ending(self) -> bool:
        """Whether it was asked to end."""
        ...

    async def wait(self) -> int:
        """Its exit status, once it has ended. Raises ConnectionError if its node is lost."""
        ...

    async def end(self, grace_s: float) -> None:
        """Ask it to end, kill it after ``grace_s``; returns once it has ended.

        Raises ConnectionError if its node is lost.
        """
        ...


class ProcessKeeper(Protocol):
    """Starts processes and finds those that an earlier server started."""

    def processes(self) -> Mapping[str, KeptProcess]:
        """The processes held now, by name; engines are not among them."""
        ...

    async def start(
        self, name: str, argv: Sequence[str], stdin_line: str, *, grace_s: float, stamp: str
    ) -> KeptProcess:
        """Start a process under an unused name.

        ``stdin_line`` is written to its standard input, which then stays open as long as the keeper
        lives. Raises OServeError if the process cannot be started, ConnectionError if its node is
        lost.
        """
        ...

    async def failure(self, name: str, process: KeptProcess) -> str:
        """Why a process that has ended did so, and where its log is."""
        ...


class NodeKeeper(ProcessKeeper, Protocol):
    """The keeper of another node."""

    @property
    def node(self) -> str: ...

    @property
    def hatch(self) -> HatchAddress | None:
        """Where the node's sockets are."""
        ...

    @property
    def folder(self) -> Path:
        """The node's private folder, on that node."""
        ...

    @property
    def python(self) -> str:
        """The interpreter there."""
        ...
