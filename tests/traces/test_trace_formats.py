"""BurstGPT's and Azure's CSV, bad rows refused or counted, and files that are no trace."""

import contextlib
import gzip
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oserve.core import OServeError
from oserve.traces import BadRows, Skipped, TraceRequest, read_trace

BURST = (
    "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,ChatGPT,472,18,490,Conversation log\n"
    "45,GPT-4,0,0,0,API log\n"
    "45,GPT-4,1087,230,1317,Conversation log\n"
)
BURST_SESSIONS = (
    "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    '5,a1,3.5,ChatGPT,472,18,490,"Conversation log"\n'
    "6.5,,1.25,GPT-4,300,1,301,API log\n"
)
CANONICAL = "arrival_s,input_tokens,output_tokens\n"


def write(folder: Path, text: str, *, packed: bool = False) -> Path:
    path = folder / "trace"
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    return path


@pytest.mark.parametrize("packed", [True, False])
def test_burstgpt_without_its_failures(tmp_path: Path, packed: bool) -> None:
    skipped = Skipped()
    first, second = read_trace(write(tmp_path, BURST, packed=packed), skipped=skipped)
    assert first == TraceRequest(
        arrival_s=5.0, prompt_tokens=472, output_tokens=18, model="ChatGPT"
    )
    assert (second.arrival_s, second.prompt_tokens, second.output_tokens) == (45.0, 1087, 230)
    assert (skipped.count, skipped.failures) == (0, 1)


def test_burstgpt_with_sessions(tmp_path: Path) -> None:
    first, second = read_trace(write(tmp_path, BURST_SESSIONS))
    assert (first.session, first.model) == ("a1", "ChatGPT")
    assert (second.session, second.arrival_s, second.output_tokens) == ("", 6.5, 1)


@settings(derandomize=True, deadline=None)
@given(st.permutations(range(8)), st.sampled_from([str.upper, str.lower, str.title]))
def test_columns_are_found_by_name(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], spell: object
) -> None:
    header, *rows = [line.split(",") for line in BURST_SESSIONS.replace('"', "").splitlines()]
    header = [spell(name) for name in header]  # type: ignore[operator]
    text = "\n".join(",".join(line[at] for at in order) for line in [header, *rows])
    path = write(tmp_path_factory.getbasetemp(), "\ufeff" + text + "\r\n")
    assert [item.prompt_tokens for item in read_trace(path)] == [472, 300]


@pytest.mark.parametrize(
    ("stamps", "seconds"),
    [
        (("2023-11-16 18:17:03.9799600", "2023-11-16 18:17:04.0319569"), 0.0519969),
        (("2024-05-10 00:00:00.009930+00:00", "2024-05-10 00:00:01+00:00"), 0.99007),
        (("2024-05-10 00:00:00.009930+00:00", "2024-05-10 00:00:00.5Z"), 0.49007),
        (("2024-05-10 00:00:00", "2024-05-10T00:00:00.000000001"), 1e-9),
        (("2024-05-10 23:59:59.5-05:00", "2024-05-11 07:00:00.25+02:00"), 0.75),
        (("2024-05-10 23:59:59-0500", "2024-05-11 05:00:00"), 1.0),
    ],
)
def test_azure_stamps(tmp_path: Path, stamps: tuple[str, str], seconds: float) -> None:
    rows = "".join(f"{stamp},10,{at + 1}\n" for at, stamp in enumerate(stamps))
    path = write(tmp_path, "TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows)
    first, second = read_trace(path)
    assert first.arrival_s == 0.0
    assert second.arrival_s == pytest.approx(seconds, abs=1e-12)
    assert (second.prompt_tokens, second.output_tokens) == (10, 2)


@pytest.mark.parametrize(
    ("stamp", "words"),
    [
        ("2024-05-10", "not a time"),
        ("2024-13-10 00:00:00", "not a time"),
        ("2024-05-10 00:00:00.", "not a time"),
        ("2024-05-10 00:00:00 or so", "not a time"),
        ("2023-05-10 00:00:00", "backwards"),
    ],
)
def test_azure_stamps_that_are_none(tmp_path: Path, stamp: str, words: str) -> None:
    header = "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00,1,1\n"
    path = write(tmp_path, f"{header}{stamp},1,1\n")
    with pytest.raises(OServeError, match=words) as caught:
        list(read_trace(path))
    assert caught.value.place == f"{path}:3"


BAD = ["x,1,1", "3,-4,1", "3,1,-4", "3,1", "nan,1,1", "3,1e99,1", "3,1_0,1", "-3,1,1", '3,"1,1']
good_or_bad = st.lists(st.one_of(st.none(), st.sampled_from(BAD)), min_size=1, max_size=40)


@settings(derandomize=True, deadline=None)
@given(good_or_bad)
def test_bad_rows_are_skipped_and_counted(
    tmp_path_factory: pytest.TempPathFactory, rows: list[str | None]
) -> None:
    lines = [row or f"{at},{at + 1},1" for at, row in enumerate(rows)]
    path = write(tmp_path_factory.getbasetemp(), CANONICAL + "\n".join(lines) + "\n")
    bad = [at for at, row in enumerate(rows) if row is not None]
    skipped = Skipped()
    reader = read_trace(path, bad_rows=BadRows.SKIP, skipped=skipped)
    if len(bad) == len(rows):
        with pytest.raises(OServeError, match="every row is bad"):
            list(reader)
    else:
        read = [item.prompt_tokens for item in reader]
        assert read == [at + 1 for at, row in enumerate(rows) if row is None]
    assert skipped.count == len(bad)
    assert [item.split(":")[0] for item in skipped.first] == [f"line {at + 2}" for at in bad[:5]]
    if bad:
        with pytest.raises(OServeError) as caught:
            list(read_trace(path))
        assert caught.value.place == f"{path}:{bad[0] + 2}"


def test_rows_that_go_back_in_time_are_skipped(tmp_path: Path) -> None:
    path = write(tmp_path, CANONICAL + "5,1,1\n4,2,1\n5,3,1\n")
    skipped = Skipped()
    read = list(read_trace(path, bad_rows=BadRows.SKIP, skipped=skipped))
    assert [item.prompt_tokens for item in read] == [1, 3]
    assert skipped.first == ["line 3: time runs backwards: 4 s"]


def test_an_azure_trace_starts_at_its_first_good_row(tmp_path: Path) -> None:
    rows = ("2024-05-10 00:00:00,-1,1", "2024-05-10 00:00:05,1,1", "2024-05-10 00:00:07,1,1")
    path = write(tmp_path, "\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]))
    times = [item.arrival_s for item in read_trace(path, bad_rows=BadRows.SKIP)]
    assert times == [0.0, 2.0]


@pytest.mark.parametrize("size", [(1 << 20) - 1, 1 << 20, (1 << 20) + 1, (1 << 21) + 7])
def test_lines_have_a_limit(tmp_path: Path, size: int) -> None:
    line = "1,1,1" + " " * (size - 6)
    path = write(tmp_path, f"{CANONICAL}{line}\n2,1,1\n")
    skipped = Skipped()
    read = list(read_trace(path, bad_rows=BadRows.SKIP, skipped=skipped))
    assert len(line) + 1 == size
    assert len(read) + skipped.count == 2
    assert skipped.count == (size > 1 << 20)
    assert read[-1].arrival_s == 2.0


def test_a_limit_stops_before_what_follows_is_judged(tmp_path: Path) -> None:
    path = write(tmp_path, CANONICAL + "1,1,1\nbad\n")
    assert len(list(read_trace(path, limit=1))) == 1
    assert list(read_trace(path, limit=0)) == []


@settings(derandomize=True, deadline=None, max_examples=150)
@given(st.binary(max_size=200), st.sampled_from(["", CANONICAL, BURST, "{", "\x1f"]))
def test_anything_else_is_an_error_for_people(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, start: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "noise"
    path.write_bytes(start.encode() + data)
    for bad_rows in BadRows:
        # Whatever else is raised fails the test.
        with contextlib.suppress(OServeError):
            for item in read_trace(path, bad_rows=bad_rows):
                assert item.prompt_tokens >= 1
                assert item.output_tokens >= 1
                assert item.arrival_s >= 0


def test_damaged_archives(tmp_path: Path) -> None:
    source = random.Random(0)
    text = CANONICAL + "".join(f"{at},{source.randrange(9999)},1\n" for at in range(500))
    whole = gzip.compress(text.encode())
    path = tmp_path / "trace"
    for at in range(2, len(whole), 97):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        with contextlib.suppress(OServeError):
            list(read_trace(path, bad_rows=BadRows.SKIP))
    with pytest.raises(OServeError):
        list(read_trace(tmp_path))
