"""Counts files: wide, long, rates, gaps, and where they are wrong."""

import gzip
import math
from pathlib import Path

import numpy as np
import pytest

from oserve.core import OServeError
from oserve.traces.counts import is_counts, read_counts


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "counts.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_wide_with_gaps(tmp_path: Path) -> None:
    path = written(tmp_path, "window_s,chat,Code\n0,1,2\n60,3,\n\n240,5,6\n")
    assert is_counts(path)
    table = read_counts(path)
    assert (table.names, table.start_s, table.window_s) == (("chat", "code"), 0.0, 60.0)
    nan = math.nan
    expected: list[list[float]] = [[1, 2], [3, nan], [nan, nan], [nan, nan], [5, 6]]
    assert np.array_equal(table.counts, expected, equal_nan=True)


def test_rates_become_counts(tmp_path: Path) -> None:
    path = written(tmp_path, "window_s,a_per_min,b_rps,c\n600,6,0.5,7\n1200,12,1,8\n")
    assert read_counts(path).counts.tolist() == [[60, 300, 7], [120, 600, 8]]


def test_long_in_any_order_and_packed(tmp_path: Path) -> None:
    path = tmp_path / "counts.csv.gz"
    rows = "window_s,client,count,cv\n60,x,5,1.0\n0,x,1,1.0\n180,y,2,\n"
    path.write_bytes(gzip.compress(rows.encode()))
    table = read_counts(path)
    assert table.names == ("x", "y")
    expected: list[list[float]] = [[1, 0], [5, 0], [math.nan, math.nan], [0, 2]]
    assert np.array_equal(table.counts, expected, equal_nan=True)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("time,a\n0,1\n", 1, "header"),
        ("window_s\n0\n", 1, "header"),
        ("window_s,a,a\n0,1,2\n", 1, "one name"),
        ("window_s,a\n0,1\n", 2, "two windows"),
        ("window_s,a\n0,1\n60,1,1\n", 3, "3 fields"),
        ("window_s,a\n0,1\n60,x\n", 3, "'x'"),
        ("window_s,a\n0,1\n60,-1\n", 3, "'-1'"),
        ("window_s,a\n0,1\n60,nan\n", 3, "'nan'"),
        ("window_s,a\n60,1\n0,1\n", 3, "does not go on"),
        ("window_s,a\n0,1\n60,1\n60,1\n", 4, "does not go on"),
        ("window_s,a\n0,1\n60,1\n130,1\n", 4, "off the step"),
        ("window_s,a\n0,1\n1,1\n99999999,1\n", 4, "too many"),
        ("window_s,who,count\n0,a,1\n60,a,1\n60,a,2\n", 4, "second count"),
    ],
)
def test_errors_name_file_and_line(tmp_path: Path, text: str, line: int, words: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(OServeError, match=words) as caught:
        read_counts(path)
    assert caught.value.place == f"{path}:{line}"
    assert caught.value.remedy


def test_what_is_no_counts_file(tmp_path: Path) -> None:
    assert not is_counts(tmp_path / "none")
    assert not is_counts(written(tmp_path, "arrival_s,input_tokens,output_tokens\n"))
    assert not is_counts(written(tmp_path, ""))
    with pytest.raises(OServeError, match="No such file"):
        read_counts(tmp_path / "none")
    damaged = tmp_path / "damaged.gz"
    damaged.write_bytes(gzip.compress(b"window_s,a\n" + b"0,1\n" * 999)[:40])
    with pytest.raises(OServeError, match="damaged"):
        read_counts(damaged)
