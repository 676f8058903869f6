"""OServe's own records, as the gateway writes them, read as a trace."""

import os
import sqlite3
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oserve.core import FinishStatus, OServeError, RequestRecord
from oserve.gateway.records import RecordStore
from oserve.traces import BadRows, Skipped, read_trace

START_S = 1.7e9


def record(
    arrival_s: float,
    prompt_tokens: int = 5,
    output_tokens: int = 7,
    status: FinishStatus = FinishStatus.COMPLETED,
) -> RequestRecord:
    return RequestRecord(
        arrival_s=arrival_s,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        workload_type="short",
        replica="r0",
        ttft_s=0.1,
        tpot_s=None,
        e2e_s=0.2,
        status=status,
    )


def store(path: Path, records: list[RequestRecord]) -> Path:
    path.unlink(missing_ok=True)
    written = RecordStore(path, max_records=1000)
    for item in records:
        assert written.put(item)
    written.close()
    return path


def test_completed_requests_in_order_of_arrival(tmp_path: Path) -> None:
    path = store(
        tmp_path / "re cords?#.db",
        [
            record(START_S + 9, prompt_tokens=9),
            record(START_S + 1, status=FinishStatus.FAILED),
            record(START_S + 2, prompt_tokens=2),
            record(START_S + 3, output_tokens=0),
            record(START_S + 4.5, prompt_tokens=4),
        ],
    )
    before = path.read_bytes()
    skipped = Skipped()
    read = list(read_trace(path, skipped=skipped))
    assert [(item.arrival_s, item.prompt_tokens) for item in read] == [(0, 2), (2.5, 4), (7, 9)]
    assert {item.model for item in read} == {"short"}
    assert (skipped.count, skipped.failures) == (0, 2)
    assert path.read_bytes() == before
    assert len(list(read_trace(path, limit=1))) == 1
    assert len(list(read_trace(path, until_s=2.5))) == 1


@settings(derandomize=True, deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.floats(0, 1e6), st.integers(1, 1000)), min_size=1, max_size=20))
def test_any_order_of_ends_gives_the_order_of_arrivals(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[float, int]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.db"
    path.unlink(missing_ok=True)
    # The columns only, since the store itself makes its writer wait a moment.
    with sqlite3.connect(path) as connection:
        connection.execute(
            "CREATE TABLE requests (arrival_s, prompt_tokens, output_tokens, workload_type, status)"
        )
        connection.executemany("INSERT INTO requests VALUES (?, ?, 1, 'a', 'completed')", rows)
    connection.close()
    read = list(read_trace(path))
    first = min(arrival for arrival, _ in rows)
    assert [item.arrival_s for item in read] == sorted(arrival - first for arrival, _ in rows)
    assert sorted(item.prompt_tokens for item in read) == sorted(prompt for _, prompt in rows)


def test_rows_that_make_no_sense(tmp_path: Path) -> None:
    path = store(tmp_path / "records.db", [record(START_S), record(START_S + 1, prompt_tokens=-4)])
    with pytest.raises(OServeError, match="-4") as caught:
        list(read_trace(path))
    assert caught.value.place == f"{path}:2"
    skipped = Skipped()
    assert len(list(read_trace(path, bad_rows=BadRows.SKIP, skipped=skipped))) == 1
    assert skipped.count == 1


def test_other_databases_and_damaged_ones(tmp_path: Path) -> None:
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE notes (text)")
    connection.close()
    with pytest.raises(OServeError, match="not request records"):
        list(read_trace(other))
    path = store(tmp_path / "records.db", [record(START_S + at) for at in range(500)])
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(OServeError, match="damaged"):
        list(read_trace(path))


def test_a_store_that_is_being_written(tmp_path: Path) -> None:
    path = store(tmp_path / "records.db", [record(START_S)])
    with sqlite3.connect(path) as writer:
        writer.execute("INSERT INTO requests SELECT * FROM requests")
        writer.commit()
        assert len(list(read_trace(path))) == 2
    writer.close()


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only to the superuser")
def test_a_store_in_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    folder.mkdir()
    path = store(folder / "records.db", [record(START_S)])
    folder.chmod(0o500)
    try:
        assert len(list(read_trace(path))) == 1
    finally:
        folder.chmod(0o700)
