"""The one error a person is meant to read."""

from functools import partial
from typing import Any


class OServeError(Exception):
    """Bad input or an impossible wish: says where it is and what to do about it.

    The CLI prints it and exits with code 2; no traceback is shown.
    """

    def __init__(self, message: str, *, place: str, remedy: str) -> None:
        super().__init__(message)
        self.message = message
        self.place = place
        self.remedy = remedy

    def __reduce__(self) -> Any:
        """As pickle takes it, for one that is raised in another process."""
        return partial(type(self), self.message, place=self.place, remedy=self.remedy), ()

    def __str__(self) -> str:
        return f"{self.place}: {self.message} ({self.remedy})"
