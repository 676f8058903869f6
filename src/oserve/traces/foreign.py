"""Detection of files that are mistaken for traces, each with a remedy."""

from pathlib import Path

from oserve.core import OServeError

# Magic bytes, the kind of file, and the remedy.
_KNOWN: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "it is a Git LFS pointer, not the file", "fetch it: git lfs pull"),
    (b"<", "it is a page of HTML or XML", "look at what was downloaded"),
    (b"PK\x03\x04", "it is a zip archive", "unpack it"),
    (b"BZh", "it is packed with bzip2", "unpack it: bunzip2"),
    (b"\xfd7zXZ", "it is packed with xz", "unpack it: unxz"),
    (b"\x28\xb5\x2f\xfd", "it is packed with zstd", "unpack it: unzstd"),
    (b"PAR1", "it is a Parquet file", "write it as CSV: pandas.read_parquet(...).to_csv(...)"),
    (b"\xff\xfe", "it is text in UTF-16", "save it as UTF-8"),
    (b"\xfe\xff", "it is text in UTF-16", "save it as UTF-8"),
)
_RESULTS = "replay the trace that was measured with instead"


def refuse_foreign_file(path: Path, start: bytes) -> None:
    """Raise OServeError if a file with this start is of a known kind other than a trace."""
    for mark, what, remedy in _KNOWN:
        if start.startswith(mark):
            raise OServeError(what, place=str(path), remedy=remedy)
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    if b"\0" in start:
        raise OServeError("it is a binary file", place=str(path), remedy="give a text file")
    if text.startswith(b"["):
        remedy = "write one object a line (jq -c '.[]'), each with a time and two lengths"
        what = "it is one JSON array"
        if b'"conversations"' in text or b'"conversation' in text:
            what = "it is a file of conversations (ShareGPT's form): no times, no token counts"
            remedy = "give a trace with both, or --synthetic where the command has it"
        raise OServeError(what, place=str(path), remedy=remedy)
    if text.startswith(b"{"):
        if b'"conversations"' in text:
            raise OServeError(
                "it holds conversations (ShareGPT's form): no times, no token counts",
                place=str(path),
                remedy="give a trace with both, or --synthetic where the command has it",
            )
        if b'"endpoint_type"' in text or b'"tokenizer_id"' in text:
            raise OServeError("it is a result of vllm bench", place=str(path), remedy=_RESULTS)
        if b'"requests_per_s"' in text:
            raise OServeError("it is a report of oserve bench", place=str(path), remedy=_RESULTS)
