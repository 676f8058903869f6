"""The record store: one SQLite row per finished request, bounded, without any text."""

import contextlib
import sqlite3
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

from oserve.core import FinishStatus, OServeError, RequestRecord

_SCHEMA = """
CREATE TABLE IF NOT EXISTS requests (
    arrival_s REAL NOT NULL,
    prompt_tokens INTEGER NOT NULL,
    output_tokens INTEGER NOT NULL,
    workload_type TEXT NOT NULL,
    replica TEXT NOT NULL,
    ttft_s REAL,
    tpot_s REAL,
    e2e_s REAL NOT NULL,
    status TEXT NOT NULL,
    moves INTEGER NOT NULL DEFAULT 0,
    tier TEXT NOT NULL DEFAULT '',
    tenant TEXT NOT NULL DEFAULT '',
    kept INTEGER
);
CREATE INDEX IF NOT EXISTS requests_arrival ON requests (arrival_s);
"""
# Columns that files of earlier versions lack.
_ADDED = {
    "moves": "INTEGER NOT NULL DEFAULT 0",
    "tier": "TEXT NOT NULL DEFAULT ''",
    "tenant": "TEXT NOT NULL DEFAULT ''",
    "kept": "INTEGER",
}
_COLUMNS = 13
_ROW = f"({', '.join('?' * _COLUMNS)})"
# Some builds of SQLite take at most 999 parameters.
_ROWS_AT_ONCE = 72
_INSERT = f"INSERT INTO requests VALUES {_ROW}"
_INSERT_MANY = f"INSERT INTO requests VALUES {', '.join([_ROW] * _ROWS_AT_ONCE)}"
_FLUSH_S = 0.1
_BACKLOG = 50_000


class RecordSink(Protocol):
    """Where the records of finished requests go."""

    def put(self, record: RequestRecord) -> bool:
        """Take a record; ``False``: there was no room, and it was dropped."""
        ...

    def close(self) -> None:
        """No more records come."""
        ...


class RecordStore:
    """Writes records in a thread, behind a bounded backlog, so the request path never waits.

    Several processes may write one file.
    """

    def __init__(self, path: Path, *, max_records: int) -> None:
        self._path = path
        self._max_records = max_records
        self._backlog: deque[RequestRecord] = deque()
        self._ended = threading.Event()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(path, timeout=30.0)
            connection.execute("PRAGMA journal_mode=WAL")
            connection.executescript(_SCHEMA)
            columns = [row[1] for row in connection.execute("PRAGMA table_info(requests)")]
            for name, kind in _ADDED.items():
                if name not in columns:
                    connection.execute(f"ALTER TABLE requests ADD COLUMN {name} {kind}")
            connection.close()
        except (OSError, sqlite3.Error) as error:
            raise OServeError(
                f"cannot keep request records there: {error}",
                place=str(path),
                remedy="choose another gateway.records_file, or move the file away",
            ) from None
        self._writer = threading.Thread(target=self._write, name="records", daemon=True)
        self._writer.start()

    def put(self, record: RequestRecord) -> bool:
        """Queue a record; ``False``: the backlog is full and the record was dropped."""
        if len(self._backlog) >= _BACKLOG:
            return False
        self._backlog.append(record)
        return True

    def close(self) -> None:
        """Write the backlog and end the thread."""
        self._ended.set()
        self._writer.join(timeout=30.0)

    def _write(self) -> None:
        connection = sqlite3.connect(self._path, timeout=30.0)
        connection.execute("PRAGMA synchronous=NORMAL")
        written = 0
        # The thread polls: waking it for each record would cost the request path more.
        while not self._ended.wait(_FLUSH_S) or self._backlog:
            batch = [self._backlog.popleft() for _ in range(len(self._backlog))]
            if not batch:
                continue
            # A full disk must not end serving; the rows of this batch are lost then.
            with contextlib.suppress(sqlite3.Error), connection:
                _insert(connection, [_row(record) for record in batch])
                written += len(batch)
            if written >= self._max_records // 20 + 1:
                written = 0
                with contextlib.suppress(sqlite3.Error):
                    self._trim(connection)
        connection.close()

    def _trim(self, connection: sqlite3.Connection) -> None:
        with connection:
            connection.execute(
                "DELETE FROM requests WHERE rowid <= (SELECT max(rowid) FROM requests) - ?",
                (self._max_records,),
            )


def _insert(connection: sqlite3.Connection, rows: list[tuple[object, ...]]) -> None:
    """Insert many rows with few statements.

    Each statement releases the interpreter lock and takes it again. While the request path is busy,
    that takes up to the switch interval (5 ms) and interrupts the request path.
    """
    whole = len(rows) - len(rows) % _ROWS_AT_ONCE
    for start in range(0, whole, _ROWS_AT_ONCE):
        values = chain.from_iterable(rows[start : start + _ROWS_AT_ONCE])
        connection.execute(_INSERT_MANY, tuple(values))
    connection.executemany(_INSERT, rows[whole:])


def _row(record: RequestRecord) -> tuple[object, ...]:
    return (
        record.arrival_s,
        record.prompt_tokens,
        record.output_tokens,
        record.workload_type,
        record.replica,
        record.ttft_s,
        record.tpot_s,
        record.e2e_s,
        record.status.value,
        record.moves,
        record.tier,
        record.tenant,
        record.kept,
    )


def newest_record(path: Path) -> int:
    """The number of the newest record, counted over the life of a store; 0 without any."""
    if not path.is_file():
        return 0
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        row = connection.execute("SELECT max(rowid) FROM requests").fetchone()
    return int(row[0] or 0)


def slo_counts(
    path: Path, *, ttft_s: float | None, tpot_s: float | None, start_s: float, end_s: float
) -> tuple[int, int]:
    """Requests that arrived between two Unix times, and how many of them met the limits.

    Those that clients gave up or got wrong do not count. A time that is undefined meets its limit.
    """
    never = float("inf")
    values = {
        "ttft": never if ttft_s is None else ttft_s,
        "tpot": never if tpot_s is None else tpot_s,
        "start": start_s,
        "end": end_s,
        "done": FinishStatus.COMPLETED.value,
        "gone": FinishStatus.DISCONNECTED.value,
        "wrong": FinishStatus.CLIENT_ERROR.value,
    }
    query = """
        SELECT count(*), coalesce(sum(status = :done AND coalesce(ttft_s, 0) <= :ttft
                                      AND coalesce(tpot_s, 0) <= :tpot), 0)
        FROM requests
        WHERE arrival_s >= :start AND arrival_s < :end AND status NOT IN (:gone, :wrong)
    """
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        requests, met = connection.execute(query, values).fetchone()
    return int(requests), int(met)


def read_records(path: Path, *, last: int | None = None) -> Iterator[RequestRecord]:
    """The records of a store, or its ``last`` ones, oldest first."""
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    first = "0" if last is None else "(SELECT max(rowid) FROM requests) - :last"
    query = f"SELECT * FROM requests WHERE rowid > {first} ORDER BY rowid"
    try:
        for row in connection.execute(query, {"last": last}):
            yield _record(row)
    finally:
        connection.close()


def records_after(path: Path, number: int, *, most: int) -> tuple[int, list[RequestRecord]]:
    """Records newer than the one with that number, the newest ``most``, oldest first.

    Also returns the number of the newest record, counted as in ``newest_record``.
    """
    if not path.is_file():
        return number, []
    query = "SELECT rowid, * FROM requests WHERE rowid > ? ORDER BY rowid DESC LIMIT ?"
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        rows = connection.execute(query, (number, most)).fetchall()
    rows.reverse()
    return (int(rows[-1][0]) if rows else number), [_record(row[1:]) for row in rows]


def records_between(path: Path, start_s: float, end_s: float, *, most: int) -> list[RequestRecord]:
    """The first ``most`` records of requests that arrived between two Unix times."""
    query = (
        "SELECT * FROM requests WHERE arrival_s >= ? AND arrival_s < ? ORDER BY arrival_s LIMIT ?"
    )
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        return [_record(row) for row in connection.execute(query, (start_s, end_s, most))]


@dataclass(frozen=True, slots=True, kw_only=True)
class RanBetween:
    """Requests that ran at some time of a span: all, how often they moved, and how many failed."""

    requests: int
    moves: int
    failed: int


def ran_between(path: Path, start_s: float, end_s: float, *, longest_s: float) -> RanBetween:
    """Requests that ran between two Unix times, of those that took at most ``longest_s``."""
    query = """
        SELECT count(*), coalesce(sum(moves), 0), coalesce(sum(status = :failed), 0)
        FROM requests
        WHERE arrival_s > :first AND arrival_s <= :end AND arrival_s + e2e_s >= :start
    """
    values = {
        "first": start_s - longest_s,
        "start": start_s,
        "end": end_s,
        "failed": FinishStatus.FAILED.value,
    }
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        requests, moves, failed = connection.execute(query, values).fetchone()
    return RanBetween(requests=int(requests), moves=int(moves), failed=int(failed))


def _record(row: Sequence[Any]) -> RequestRecord:
    """A row of the table; those of earlier versions lack the last columns."""
    return RequestRecord(
        arrival_s=row[0],
        prompt_tokens=row[1],
        output_tokens=row[2],
        workload_type=row[3],
        replica=row[4],
        ttft_s=row[5],
        tpot_s=row[6],
        e2e_s=row[7],
        status=FinishStatus(row[8]),
        moves=row[9] if len(row) > 9 else 0,
        tier=row[10] if len(row) > 10 else "",
        tenant=row[11] if len(row) > 11 else "",
        kept=None if len(row) <= 12 or row[12] is None else bool(row[12]),
    )
