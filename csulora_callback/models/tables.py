"""Files of rows: how they are read so that nothing is guessed, and what is wrong with one that cannot be read."""

from __future__ import annotations

import csv
import json
from pathlib import Path

READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".txt": "text", ".parquet": "parquet"}
"""What ``datasets`` calls the readers of each kind of file."""

_JSON = (".json", ".jsonl")
_BINARY = (".parquet",)


def reader_options(file: Path) -> dict[str, object]:
    """Arguments of the file's reader in ``datasets``: cells of CSV are texts, and all of a JSON file has one schema.

    Raises:
        ValueError: if rows of CSV are longer than its header.

    Example:
        >>> reader_options(Path("prompts.txt"))
        {'encoding': 'utf-8-sig'}
    """
    from datasets import Features, Value

    if file.suffix == ".txt":  # readers of tables skip a byte-order mark; here it would be a part of the first line
        return {"encoding": "utf-8-sig"}
    if file.suffix in _JSON:  # otherwise all has to look as the first ten megabytes do
        return {"chunksize": max(file.stat().st_size, 1)}
    if file.suffix != ".csv":
        return {}
    with file.open(encoding="utf-8-sig", newline="") as text:
        lines = csv.reader(text)
        columns, first = next(lines, []), next(lines, [])
    if len(first) > len(columns):  # pandas would take the first field of every row for the row's name
        raise ValueError(f"expected {len(columns)} fields in line 2, saw {len(first)}")
    features = {"features": Features({column: Value("string") for column in columns})} if columns else {}
    return {"keep_default_na": False, **features}


def check_encoding(file: Path, source: str) -> None:
    """Raise ``ValueError``, which begins with ``source``, unless a file of text is in UTF-8.

    Otherwise ``datasets`` reads JSON of another encoding, and fails when somebody looks at it.

    Example:
        >>> check_encoding(Path(__file__), "tables.py")
    """
    if file.suffix in _BINARY:
        return
    number = 0
    try:
        with file.open("rb") as lines:
            for line in lines:
                number += 1
                line.decode("utf-8")
    except OSError as error:
        raise ValueError(f"{source}: expected a text file in UTF-8, but it cannot be read as one ({error})") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{source}: expected a text file in UTF-8, but it cannot be read as one (line {number}: byte "
            f"{error.object[error.start]:#04x}, {error.reason})"
        ) from error


def find_fault(file: Path) -> str | None:
    """Why a file that ``datasets`` does not read has no rows, with the place; ``None`` where only its error says it.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "rows.jsonl"
        >>> _ = file.write_text('{"prompt": "a"}' + chr(10) + '{"prompt": }')
        >>> find_fault(file)
        'line 2, column 12: Expecting value'
    """
    if file.suffix in _BINARY:
        return None if file.stat().st_size else "it is empty"
    text = file.read_text(encoding="utf-8-sig")
    lines = sum(bool(line.strip()) for line in text.splitlines())
    if not lines:
        return "it is empty"
    if file.suffix == ".csv" and lines == 1:
        return "there is no row below the header"
    return _json_fault(text, file.suffix) if file.suffix in _JSON else None


def _json_fault(text: str, suffix: str) -> str | None:
    try:
        if text.lstrip().startswith("["):
            rows = {f"item {place}": row for place, row in enumerate(json.loads(text), start=1)}
        else:
            rows = {f"line {number}": row for number, row in _json_lines(text, suffix).items()}
    except json.JSONDecodeError as error:
        return f"line {error.lineno}, column {error.colno}: {error.msg}"
    except RecursionError:
        return None
    if not rows:
        return "it is an empty list"
    at = next((at for at, row in rows.items() if not isinstance(row, dict)), None)
    return None if at is None else f"{at}: expected an object, but got {rows[at]!r:.40}"


def _json_lines(text: str, suffix: str) -> dict[int, object]:
    """By number of line; a file that ends in .json may also be one object on many lines."""
    rows = {}
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            if line.strip():
                rows[number] = json.loads(line)
        except json.JSONDecodeError as error:
            if not rows and suffix == ".json":
                return {1: json.loads(text)}
            error.lineno = number
            raise
    return rows
