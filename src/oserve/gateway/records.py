"""One row for each finished request, in SQLite; a limit on rows; nothing of prompts or answers."""

import contextlib
import sqlite3
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path

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
    moves INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX IF NOT EXISTS requests_arrival ON requests (arrival_s);
"""
_ADD_MOVES = "ALTER TABLE requests ADD COLUMN moves INTEGER NOT NULL DEFAULT 0"
_INSERT = "INSERT INTO requests VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_FLUSH_S = 0.1
_BACKLOG = 50_000


class RecordStore:
    """Rows go through a bounded backlog to a writer thread, so the request path never waits.

    Several processes may write one file. ``put`` tells ``False`` when the backlog is full and the
    record was dropped.
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
            if "moves" not in columns:
                # A file of an earlier version.
                connection.execute(_ADD_MOVES)
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
        if len(self._backlog) >= _BACKLOG:
            return False
        self._backlog.append(record)
        return True

    def close(self) -> None:
        """Write what is left and end the thread."""
        self._ended.set()
        self._writer.join(timeout=30.0)

    def _write(self) -> None:
        connection = sqlite3.connect(self._path, timeout=30.0)
        connection.execute("PRAGMA synchronous=NORMAL")
        written = 0
        # Looking at intervals, not being woken, keeps this thread out of the request path's way.
        while not self._ended.wait(_FLUSH_S) or self._backlog:
            batch = [self._backlog.popleft() for _ in range(len(self._backlog))]
            if not batch:
                continue
            # A full disk must not end serving; then the rows of this batch are gone.
            with contextlib.suppress(sqlite3.Error), connection:
                connection.executemany(_INSERT, [_row(record) for record in batch])
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
    )


def read_records(path: Path, *, last: int | None = None) -> Iterator[RequestRecord]:
    """All records of a store, or the ``last`` ones, oldest first."""
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    first = "0" if last is None else "(SELECT max(rowid) FROM requests) - :last"
    query = f"SELECT * FROM requests WHERE rowid > {first} ORDER BY rowid"
    try:
        for row in connection.execute(query, {"last": last}):
            yield RequestRecord(
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
            )
    finally:
        connection.close()
