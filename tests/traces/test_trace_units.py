"""Units of timestamps, names of columns, rows out of order, and files that are no traces."""

import bz2
import json
import lzma
import os
import random
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oserve.core import OServeError
from oserve.traces import BadRows, Skipped, TimeUnit, TraceRequest, read_trace
from oserve.traces.units import AmbiguousUnitError, infer_unit, unit_of_name

UNITS: list[TimeUnit] = [unit for unit in TimeUnit if unit is not TimeUnit.AUTO]


def arrivals(rate_rps: float, count: int = 200, seed: int = 0) -> list[float]:
    draw = random.Random(seed)
    times, now = [], 0.0
    for _ in range(count):
        times.append(round(now, 3))
        now += draw.expovariate(rate_rps)
    return times


def jsonl(folder: Path, rows: Sequence[dict[str, object]]) -> Path:
    path = folder / "trace.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def bailian(times: Sequence[float]) -> list[dict[str, object]]:
    return [
        {
            "chat_id": at,
            "parent_chat_id": at - 1 if at % 3 else -1,
            "timestamp": time,
            "input_length": 500 + at,
            "output_length": 9,
            "type": "text",
            "turn": 1 + at % 3,
            "hash_ids": [1, 2],
        }
        for at, time in enumerate(times)
    ]


def mooncake(times: Sequence[float]) -> list[dict[str, object]]:
    return [
        {"timestamp": time, "input_length": 5, "output_length": 9, "hash_ids": [at]}
        for at, time in enumerate(times)
    ]


def read(path: Path, **options: object) -> tuple[list[TraceRequest], Skipped]:
    skipped = Skipped()
    return list(read_trace(path, skipped=skipped, **options)), skipped  # type: ignore[arg-type]


def test_bailian_is_in_seconds_and_its_chats_are_conversations(tmp_path: Path) -> None:
    times = arrivals(20.0)
    found, skipped = read(jsonl(tmp_path, bailian(times)))
    assert [item.arrival_s for item in found] == times
    assert [item.session for item in found[:7]] == ["0", "0", "0", "3", "3", "3", "6"]
    assert "seconds, as Bailian's" in skipped.assumed


def test_mooncake_is_in_milliseconds(tmp_path: Path) -> None:
    found, skipped = read(jsonl(tmp_path, mooncake([0, 0, 3000, 3000, 10535])))
    assert [item.arrival_s for item in found] == [0.0, 0.0, 3.0, 3.0, 10.535]
    assert "milliseconds, as Mooncake's" in skipped.assumed


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        # Bailian's rows, their chats left out: seconds with fractions.
        (mooncake(arrivals(20.0)), "have fractions"),
        (mooncake(arrivals(2.0)), "have fractions"),
        # Whole seconds.
        (mooncake(sorted(int(time) for time in arrivals(20.0))), "requests/s in seconds"),
        # Whole microseconds.
        (mooncake([int(time * 1e6) for time in arrivals(0.5)]), "requests/s"),
        # Milliseconds, and sparse ones.
        (bailian([time * 1000 for time in arrivals(0.2)]), "requests/s"),
        # Names that say nothing.
        ([{"time": at * 250, "isl": 1, "osl": 1} for at in range(50)], "cannot be told"),
    ],
)
def test_units_that_contradict_the_format_are_refused(
    tmp_path: Path, rows: list[dict[str, object]], words: str
) -> None:
    path = jsonl(tmp_path, rows)
    with pytest.raises(OServeError, match=words) as caught:
        read(path)
    assert "--time-unit" in caught.value.remedy
    assert caught.value.place == f"{path}:1"
    for unit in UNITS:
        found, skipped = read(path, time_unit=unit)
        first = next(iter(rows[-1].values() if "time" in rows[0] else [rows[-1]["timestamp"]]))
        assert found[-1].arrival_s == pytest.approx(float(str(first)) / unit.per_s)
        assert skipped.assumed == ""


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("name", ["timestamp_{}", "Arrival ({})", "arrivedAt{}", "TIMESTAMP_{}"])
def test_names_tell_units(tmp_path: Path, unit: TimeUnit, name: str) -> None:
    spelt = unit.value.upper() if name.isupper() else unit.value
    spelt = spelt.capitalize() if name.startswith("arrivedAt") else spelt
    path = tmp_path / "trace.csv"
    times = [0.0, 1.5, 4.0]
    rows = [f"{time * unit.per_s:.0f},7,8" if unit != "s" else f"{time},7,8" for time in times]
    path.write_text("\n".join([f"{name.format(spelt)},prompt_tokens,completion_tokens", *rows]))
    found, skipped = read(path)
    assert [item.arrival_s for item in found] == times
    assert skipped.assumed == ""
    other = UNITS[(UNITS.index(unit) + 1) % len(UNITS)]
    with pytest.raises(OServeError, match=f"says {unit.word}"):
        read(path, time_unit=other)


@pytest.mark.parametrize("unit", UNITS)
def test_unix_times_tell_units_and_begin_at_zero(tmp_path: Path, unit: TimeUnit) -> None:
    start = 1_716_000_000
    rows: list[dict[str, object]] = [
        {"time": int((start + at) * unit.per_s), "input_tokens": 1, "output_tokens": 1}
        for at in range(30)
    ]
    found, skipped = read(jsonl(tmp_path, rows))
    assert [item.arrival_s for item in found] == pytest.approx([float(at) for at in range(30)])
    assert "Unix" in skipped.assumed


@given(st.floats(0.2, 1000.0), st.integers(0, 9))
def test_fractions_speak_for_seconds(rate_rps: float, seed: int) -> None:
    times = arrivals(rate_rps, seed=seed)
    found = infer_unit(times, usual=None, whose="")
    assert found.unit is TimeUnit.SECONDS
    assert "requests/s" in found.why


@given(st.lists(st.floats(0, 1e18) | st.integers(0, 10**18).map(float), max_size=30))
def test_a_unit_is_concluded_or_refused(stamps: list[float]) -> None:
    for usual in (None, TimeUnit.SECONDS, TimeUnit.MILLISECONDS):
        try:
            found = infer_unit(stamps, usual=usual, whose="X's timestamps")
        except AmbiguousUnitError:
            continue
        assert found.why
        assert usual in {None, found.unit}


def test_names_without_units() -> None:
    assert unit_of_name("timestamp_ms") == ("timestamp", TimeUnit.MILLISECONDS)
    assert unit_of_name("arrival_in_seconds") == ("arrival", TimeUnit.SECONDS)
    for name in ("timestamp", "class", "s", "_s", "timestamps"):
        assert unit_of_name(name) == (name, None)


@pytest.mark.parametrize(
    ("header", "rows", "arrivals_s"),
    [
        ("arrived_at,num_prefill_tokens,num_decode_tokens", ["0.5,1,2", "2,1,2"], [0.5, 2]),
        (
            "request_id,request_type,application_id,arrival_timestamp,batch_size,prompt_size,"
            "token_size",
            ["0,2,0,0.25,1,10,20", "1,2,0,1.5,1,10,20"],
            [0.25, 1.5],
        ),
        ("arrival_s;input_tokens;output_tokens", ["0;1;2", "1.5;1;2"], [0, 1.5]),
        ("arrival_s\tinput_tokens\toutput_tokens", ["0\t1\t2", "1.5\t1\t2"], [0, 1.5]),
        ("TIMESTAMP,ContextTokens,GeneratedTokens", ["2024-05-10T00:00:00Z,1,2",
         "2024-05-10 02:00:01 +02:00,1,2"], [0, 1]),
        ("time,input_len,output_len", ["2024-05-10 00:00:00 UTC,1,2",
         "2024-05-10 00:00:00.5,1,2"], [0, 0.5]),
        ("Timestamp,Request tokens,Response tokens", ["2024-05-10 00:00:00,1,2",
         "2024-05-10 00:00:03,1,2"], [0, 3]),
    ],
)  # fmt: skip
def test_other_names_and_delimiters(
    tmp_path: Path, header: str, rows: list[str], arrivals_s: list[float]
) -> None:
    path = tmp_path / "trace.csv"
    path.write_bytes(("\ufeff" + "\r\n".join([header, *rows]) + "\r\n").encode())
    found, _ = read(path)
    assert [item.arrival_s for item in found] == arrivals_s
    assert found[0].prompt_tokens in {1, 10}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("arrival_s,input_tokens\n0,1\n", "output length is missing"),
        ("input_tokens,output_tokens\n1,1\n", "time is missing"),
        ('{"timestamp": 0, "output_length": 1}\n', "prompt length is missing"),
        ("arrival_s,arrival_s,input_tokens,output_tokens\n0,0,1,1\n", "two columns"),
        ("arrival_s,input_tokens,output_tokens\n0,1,1,1\n", "4 fields"),
        ("arrival_s,input_tokens,output_tokens\n05/10/2024 18:17,1,1\n", "not a time"),
        ("arrival_s,input_tokens,output_tokens\n1e400,1,1\n", "inf"),
        ("arrival_s,input_tokens,output_tokens\n0,99999999999,1\n", "count of tokens"),
        ("arrival_s,input_tokens,output_tokens\n0;1;1\n", "1 fields"),
        ("[1, 2]\n", "JSON array"),
        ('[{"id": "a", "conversations": []}]\n', "ShareGPT"),
        ('{"id": "a", "conversations": []}\n', "ShareGPT"),
        ('{"date": "x", "endpoint_type": "vllm", "backend": "vllm"}\n', "vllm bench"),
        ('{"trace": "x", "requests_per_s": 2}\n', "oserve bench"),
        ("{\n", "JSON"),
        ("<!DOCTYPE html>\n", "HTML"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "LFS"),
        ("\n", "empty"),
    ],
)
def test_files_that_are_none_are_told_what_they_are(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "trace"
    path.write_text(text)
    for bad_rows in BadRows:
        with pytest.raises(OServeError, match=words) as caught:
            read(path, bad_rows=bad_rows)
        assert str(path) in caught.value.place
        assert caught.value.remedy


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (bz2.compress(b"x"), "bzip2"),
        (lzma.compress(b"x"), "xz"),
        (b"PAR1abc", "Parquet"),
        (b"PK\x03\x04abc", "zip"),
        ("arrival_s\n".encode("utf-16"), "UTF-16"),
        (b"\x7fELF\0\0", "binary"),
        (b"arrival_s,input_tokens,output_tokens,model\n0,1,1,se\xf1or\n", "UTF-8"),
        (b"x" * (1 << 21), "longer than"),
        (b"", "empty"),
    ],
)
def test_bytes_that_are_none(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "trace"
    path.write_bytes(data)
    with pytest.raises(OServeError, match=words):
        read(path)


@settings(max_examples=25)
@given(st.permutations(range(12)), st.none() | st.integers(0, 12))
def test_rows_in_any_order_can_be_sorted(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], limit: int | None
) -> None:
    path = tmp_path_factory.getbasetemp() / "unsorted.csv"
    for header, stamp in (("arrival_s", "{}"), ("time", "2024-05-10 00:00:{:02}")):
        rows = [f"{stamp.format(at)},{at + 1},1" for at in order]
        path.write_text("\n".join([f"{header},input_tokens,output_tokens", *rows]))
        found, skipped = read(path, sort=True, limit=limit)
        assert [item.prompt_tokens for item in found] == list(range(1, 13))[:limit]
        assert [item.arrival_s for item in found] == [float(at) for at in range(12)][:limit]
        assert skipped.count == 0
        if order != sorted(order):
            with pytest.raises(OServeError, match="backwards") as caught:
                read(path)
            assert "--sort" in caught.value.remedy


def test_what_comes_through_a_pipe_is_read_whole(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    text = "arrival_s,input_tokens,output_tokens\n" + "".join(f"{at},1,1\n" for at in range(50))
    writer = threading.Thread(target=lambda: pipe.write_text(text))
    writer.start()
    found, _ = read(pipe)
    writer.join()
    assert len(found) == 50


def test_a_bad_first_row_does_not_decide(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\nx,1,1\n2024-05-10 00:00:05,1,1\n")
    found, skipped = read(path, bad_rows=BadRows.SKIP)
    assert (len(found), skipped.count) == (1, 1)
