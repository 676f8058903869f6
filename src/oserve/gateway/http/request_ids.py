"""Ids for requests that arrive without one."""

import os

_ID_BYTES = 16
_IDS_AT_ONCE = 256


class RequestIds:
    """Generates unguessable ids of 32 hexadecimal digits.

    One system call reads the random bytes of many ids; a call for each would be a large part of
    the cost of a short answer.
    """

    __slots__ = ("_ids",)

    def __init__(self) -> None:
        self._ids: list[bytes] = []

    def take(self) -> bytes:
        """A new id."""
        if not self._ids:
            digits = os.urandom(_ID_BYTES * _IDS_AT_ONCE).hex().encode()
            step = 2 * _ID_BYTES
            self._ids = [digits[at : at + step] for at in range(0, len(digits), step)]
        return self._ids.pop()
