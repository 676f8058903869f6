"""The interface of the keeper that holds the gateway processes."""

from collections.abc import Mapping, Sequence
from typing import Protocol


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
        """Its exit status, once it has ended."""
        ...

    async def end(self, grace_s: float) -> None:
        """Ask it to end, kill it after ``grace_s``; returns once it has ended."""
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
        lives. Raises OServeError if the process cannot be started.
        """
        ...

    def failure(self, name: str) -> str:
        """Why the process of that name ended, and where its log is."""
        ...
