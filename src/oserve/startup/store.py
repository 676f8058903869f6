"""The saved state of the controller: one SQLite file, each save one transaction.

If the server is killed at any moment, the last save is complete. The file also holds the arrivals
of each second and the plans that were in force, for ``oserve replay``, and what the page showed in
the last six hours.
"""

import contextlib
import sqlite3
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from oserve.control.decision import Decision
from oserve.core import OServeError

_COUNTS_DECODER = msgspec.json.Decoder(list[float])

_DECISION_DECODER = msgspec.json.Decoder(Decision)

SavedT = TypeVar("SavedT")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS memory (name TEXT PRIMARY KEY, value BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS decisions (at_s REAL NOT NULL, record BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS plans (at_s REAL NOT NULL, plan TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS seconds (second INTEGER PRIMARY KEY, counts BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS page (at_s REAL PRIMARY KEY, point BLOB NOT NULL, state BLOB NOT NULL);
"""
_MOST = {"decisions": 10_000, "plans": 1_000, "seconds": 7 * 86_400, "page": 6 * 360}


@dataclass(frozen=True, slots=True, kw_only=True)
class StateUpdate:
    """What one save writes; empty fields keep the saved values.

    ``page``: Unix time, a point of the page's charts, and the state that the page showed then.
    """

    memory: Mapping[str, bytes]
    decisions: Sequence[Decision] = ()
    plan: tuple[float, str] | None = None
    seconds: Sequence[tuple[int, list[float]]] = ()
    page: Sequence[tuple[float, bytes, bytes]] = ()


class StateStore:
    """One state file. Raises OServeError if it cannot be written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with contextlib.closing(self._connect()) as connection:
                connection.execute("PRAGMA journal_mode=WAL")
                connection.executescript(_SCHEMA)
        except sqlite3.Error as error:
            raise OServeError(
                f"cannot save the controller's state there: {error}",
                place=str(path),
                remedy="move the file away, or choose another --state-dir",
            ) from None

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self._path, timeout=30.0)

    def save(self, save: StateUpdate) -> None:
        """Save all or nothing. If the disk is full, nothing is saved and serving continues."""
        with (
            contextlib.suppress(sqlite3.Error),
            contextlib.closing(self._connect()) as connection,
            connection,
        ):
            connection.executemany("REPLACE INTO memory VALUES (?, ?)", list(save.memory.items()))
            connection.executemany(
                "INSERT INTO decisions VALUES (?, ?)",
                [(item.at_s, msgspec.json.encode(item)) for item in save.decisions],
            )
            if save.plan is not None:
                connection.execute("INSERT INTO plans VALUES (?, ?)", save.plan)
            connection.executemany(
                "REPLACE INTO seconds VALUES (?, ?)",
                [(second, msgspec.json.encode(counts)) for second, counts in save.seconds],
            )
            connection.executemany(
                "REPLACE INTO page VALUES (?, ?, ?)",
                [(at_s, point, zlib.compress(state)) for at_s, point, state in save.page],
            )
            for table, most in _MOST.items():
                connection.execute(
                    f"DELETE FROM {table} WHERE rowid <= (SELECT max(rowid) FROM {table}) - ?",
                    (most,),
                )

    def saved(self, name: str, kind: type[SavedT]) -> SavedT | None:
        """The value saved under a name; ``None`` if there is none, or it is not of this kind."""
        with contextlib.suppress(sqlite3.Error, msgspec.DecodeError):
            with contextlib.closing(self._connect()) as connection:
                row = connection.execute(
                    "SELECT value FROM memory WHERE name = ?", (name,)
                ).fetchone()
            return None if row is None else msgspec.json.decode(row[0], type=kind)
        return None

    def decisions(self, most: int) -> list[Decision]:
        """The last ``most`` decisions, oldest first."""
        rows = self._rows("SELECT record FROM decisions ORDER BY rowid DESC LIMIT ?", most)
        return [_DECISION_DECODER.decode(row[0]) for row in reversed(list(rows))]

    def plans(self) -> list[tuple[float, str]]:
        """Each plan with the Unix time it came into force, as a plan file, oldest first."""
        return [(row[0], row[1]) for row in self._rows("SELECT * FROM plans ORDER BY rowid")]

    def seconds(self, *, after_s: int = -1) -> Iterator[tuple[int, list[float]]]:
        """Arrivals per type in each recorded second, oldest first."""
        query = "SELECT second, counts FROM seconds WHERE second > ? ORDER BY second"
        for row in self._rows(query, after_s):
            yield row[0], _COUNTS_DECODER.decode(row[1])

    def points(self, *, after_s: float) -> list[bytes]:
        """The points of the page's charts since a Unix time, oldest first."""
        query = "SELECT point FROM page WHERE at_s > ? ORDER BY at_s"
        return [row[0] for row in self._rows(query, after_s)]

    def page_states(self, *, start_s: float, end_s: float) -> Iterator[tuple[float, bytes, bytes]]:
        """What the page showed between two Unix times: time, point and state, oldest first."""
        query = "SELECT * FROM page WHERE at_s >= ? AND at_s <= ? ORDER BY at_s"
        for row in self._rows(query, start_s, end_s):
            yield row[0], row[1], zlib.decompress(row[2])

    def page_span(self) -> tuple[float, float] | None:
        """The first and the last time that the page was saved; ``None``: never."""
        first, last = next(self._rows("SELECT min(at_s), max(at_s) FROM page"))
        return None if first is None else (first, last)

    def _rows(self, query: str, *values: object) -> Iterator[tuple[Any, ...]]:
        with contextlib.closing(self._connect()) as connection:
            yield from connection.execute(query, values)
