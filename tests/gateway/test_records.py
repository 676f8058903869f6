"""The store of records: whatever number of rows a batch has, all are written, in order."""

from pathlib import Path

import pytest

from oserve.core import FinishStatus, RequestRecord
from oserve.gateway.records import RecordStore, read_records


@pytest.mark.parametrize("count", [0, 1, 96, 250])
def test_every_row_of_a_batch_is_written_in_order(tmp_path: Path, count: int) -> None:
    records = [
        RequestRecord(
            arrival_s=0.1 * number,
            prompt_tokens=number,
            output_tokens=number + 1,
            workload_type="short",
            replica="r0",
            ttft_s=None if number % 2 else 1 / 3,
            tpot_s=None,
            e2e_s=0.5,
            status=FinishStatus.COMPLETED,
            moves=number % 3,
        )
        for number in range(count)
    ]
    store = RecordStore(tmp_path / "records.sqlite", max_records=1000)
    assert all(store.put(record) for record in records)
    store.close()
    assert list(read_records(tmp_path / "records.sqlite")) == records
    assert list(read_records(tmp_path / "records.sqlite", last=2)) == records[-2:]
