"""OServe's own request records, the gateway's SQLite file, read as a trace.

It knows the columns ``arrival_s`` (Unix time), ``prompt_tokens``, ``output_tokens``,
``workload_type`` and ``status`` of the table ``requests``, and only ever reads.
"""

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from oserve.core import FinishStatus, OServeError
from oserve.traces.request import TraceRequest
from oserve.traces.rows import BadRowError, request, ticks

MAGIC = b"SQLite format 3\x00"
"""How every such file begins."""

_QUERY = (
    "SELECT rowid, arrival_s, prompt_tokens, output_tokens, workload_type, status"
    " FROM requests ORDER BY arrival_s, rowid"
)


def record_rows(path: Path) -> Iterator[tuple[int, TraceRequest | BadRowError | None]]:
    """Row ids and rows in order of arrival, the first good one at 0 s.

    ``None`` stands for a request that did not complete, or whose lengths were never learned.
    ``model`` is the workload type. Raises OServeError when the file is damaged or no store.
    """
    try:
        with contextlib.closing(_open(path)) as connection:
            first_s: float | None = None
            for rowid, arrival, prompt, output, kind, status in connection.execute(_QUERY):
                if status != FinishStatus.COMPLETED.value or prompt == 0 or output == 0:
                    yield rowid, None
                    continue
                try:
                    arrival_s = ticks(arrival, "arrival_s")
                    start_s = arrival_s if first_s is None else first_s
                    row = request(arrival_s - start_s, prompt, output, model=str(kind))
                except BadRowError as error:
                    yield rowid, error
                    continue
                first_s = start_s
                yield rowid, row
    except sqlite3.Error as error:
        raise OServeError(
            f"these are not request records, or they are damaged: {error}",
            place=str(path),
            remedy="name the file that gateway.records_file names, or make it anew",
        ) from None


def _open(path: Path) -> sqlite3.Connection:
    address = path.resolve().as_uri()
    # A generator may be finished by another thread than began it, never by two at once.
    connection = sqlite3.connect(f"{address}?mode=ro", uri=True, check_same_thread=False)
    try:
        connection.execute("PRAGMA schema_version").fetchone()
    except sqlite3.OperationalError:
        connection.close()
        # A write-ahead store in a folder that may not be written to cannot be shared with a
        # writer, and need not be, unless a log beside it holds rows that are not in it yet.
        log = path.with_name(path.name + "-wal")
        if log.exists() and log.stat().st_size:
            raise
        connection = sqlite3.connect(f"{address}?immutable=1", uri=True, check_same_thread=False)
    return connection
