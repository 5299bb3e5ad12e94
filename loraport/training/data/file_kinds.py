"""What a data file is that is no JSONL, told as a whole rather than as many bad lines."""

from __future__ import annotations

from pathlib import Path

from loraport.errors import LoraportError

_WRITE = "write it as JSONL, in Python: pandas.{}(...).to_json(..., orient='records', lines=True)"
_UTF16 = ("text in UTF-16", "write it in UTF-8: iconv -f UTF-16 -t UTF-8")
# First bytes → what a file is, and what to do.
_BY_FIRST_BYTES = {
    b"\x1f\x8b": ("a gzip file", "unpack it: gunzip"),
    b"BZh": ("a bzip2 file", "unpack it: bunzip2"),
    b"\xfd7zXZ": ("an xz file", "unpack it: unxz"),
    b"\x28\xb5\x2f\xfd": ("a Zstandard file", "unpack it: unzstd"),
    b"PK\x03\x04": ("a zip file", "unpack it: unzip"),
    b"PAR1": ("a Parquet file", _WRITE.format("read_parquet")),
    b"ARROW1": ("an Arrow file", _WRITE.format("read_feather")),
    b"\xff\xff\xff\xff": (
        "an Arrow file as datasets saves it",
        "write it as JSONL, in Python: datasets.Dataset.from_file(...).to_json(...)",
    ),
    b"\xff\xfe": _UTF16,
    b"\xfe\xff": _UTF16,
}
_TABLES = {".csv": "read_csv", ".tsv": "read_table"}


def require_lines(path: Path, content: bytes) -> None:
    """Refuse what is no JSONL as a whole.

    Args:
        path: The file, for the message and its suffix.
        content: All of it.

    Raises:
        LoraportError: If it is another kind of file.
    """
    for beginning, (kind, remedy) in _BY_FIRST_BYTES.items():
        if content.startswith(beginning):
            raise LoraportError(f"data {path}: expected text (JSONL), got {kind}; {remedy}")
    first, _, rest = content.lstrip().partition(b"\n")
    if path.suffix.lower() in _TABLES and not first.startswith(b"{"):
        remedy = _WRITE.format(_TABLES[path.suffix.lower()])
        raise LoraportError(
            f"data {path}: expected an object on each line (JSONL), got a table; {remedy}"
        )
    lies_over_lines = first.strip() in (b"[", b"{") and rest.strip()
    if lies_over_lines or (first.startswith(b"[{") and not rest.strip()):
        got = "JSON over several lines" if lies_over_lines else "a list of all on one"
        raise LoraportError(
            f"data {path}: expected an object on each line (JSONL), got {got}; "
            f"write each object on one: jq -c '{'.[]' if first.startswith(b'[') else '.'}'"
        )
