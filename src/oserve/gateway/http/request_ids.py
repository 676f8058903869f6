"""Ids for requests whose client gave none."""

import os

_ID_BYTES = 16
_IDS_AT_ONCE = 256


class RequestIds:
    """Makes ids of 32 hexadecimal digits that cannot be guessed.

    The randomness for many ids is read at once: a system call for each is a good part of what a
    short answer costs.
    """

    __slots__ = ("_ids",)

    def __init__(self) -> None:
        self._ids: list[bytes] = []

    def take(self) -> bytes:
        """An id that was not given before."""
        if not self._ids:
            digits = os.urandom(_ID_BYTES * _IDS_AT_ONCE).hex().encode()
            step = 2 * _ID_BYTES
            self._ids = [digits[at : at + step] for at in range(0, len(digits), step)]
        return self._ids.pop()
