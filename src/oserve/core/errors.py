"""The one error that is written for people."""

from functools import partial
from typing import Any


class OServeError(Exception):
    """Bad input or a request that cannot be met: what is wrong, in what place, and the remedy.

    The CLI prints it without a traceback and exits with code 2.
    """

    def __init__(self, message: str, *, place: str, remedy: str) -> None:
        super().__init__(message)
        self.message = message
        self.place = place
        self.remedy = remedy

    def __reduce__(self) -> Any:
        """Pickle support, for errors that cross a process boundary."""
        return partial(type(self), self.message, place=self.place, remedy=self.remedy), ()

    def __str__(self) -> str:
        return f"{self.place}: {self.message} ({self.remedy})"
