"""The gateway's request records (SQLite), read as a trace.

Reads the columns ``arrival_s`` (Unix time), ``prompt_tokens``, ``output_tokens``,
``workload_type`` and ``status`` of the table ``requests``, and ``tier`` and ``tenant``, which files
of earlier versions lack; never writes.
"""

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from oserve.core import FinishStatus, OServeError
from oserve.traces.request import TraceRequest
from oserve.traces.rows import BadRowError, request, ticks

MAGIC = b"SQLite format 3\x00"
"""The first bytes of every SQLite file."""

_QUERY = (
    "SELECT rowid, arrival_s, prompt_tokens, output_tokens, workload_type, status, {tier}, {tenant}"
    " FROM requests ORDER BY arrival_s, rowid"
)


def record_rows(path: Path) -> Iterator[tuple[int, TraceRequest | BadRowError | None]]:
    """Yield row ids and rows in order of arrival, the first valid one at 0 s.

    ``None`` stands for a request that did not complete or whose lengths are unknown. ``model`` is
    the workload type. Raises OServeError if the file is damaged or holds no records.
    """
    try:
        with contextlib.closing(_open(path)) as connection:
            first_s: float | None = None
            for rowid, arrival, prompt, output, kind, status, *own in connection.execute(
                _query(connection)
            ):
                if status != FinishStatus.COMPLETED.value or prompt == 0 or output == 0:
                    yield rowid, None
                    continue
                try:
                    arrival_s = ticks(arrival, "arrival_s")
                    start_s = arrival_s if first_s is None else first_s
                    row = request(
                        arrival_s - start_s,
                        prompt,
                        output,
                        model=str(kind),
                        tier=str(own[0]),
                        tenant=str(own[1]),
                    )
                except BadRowError as error:
                    yield rowid, error
                    continue
                first_s = start_s
                yield rowid, row
    except sqlite3.Error as error:
        raise OServeError(
            f"these are not request records, or they are damaged: {error}",
            place=str(path),
            remedy="give the file that gateway.records_file names, or record a new one",
        ) from None


def _query(connection: sqlite3.Connection) -> str:
    known = {row[1] for row in connection.execute("PRAGMA table_info(requests)")}
    return _QUERY.format(**{name: name if name in known else "''" for name in ("tier", "tenant")})


def _open(path: Path) -> sqlite3.Connection:
    address = path.resolve().as_uri()
    # Another thread may finish a generator than started it, but never two at once.
    connection = sqlite3.connect(f"{address}?mode=ro", uri=True, check_same_thread=False)
    try:
        connection.execute("PRAGMA schema_version").fetchone()
    except sqlite3.OperationalError:
        connection.close()
        # SQLite cannot open a write-ahead database in a read-only folder. Without rows in the log
        # beside it, the file alone is complete and can be read as immutable.
        log = path.with_name(path.name + "-wal")
        if log.exists() and log.stat().st_size:
            raise
        connection = sqlite3.connect(f"{address}?immutable=1", uri=True, check_same_thread=False)
    return connection
