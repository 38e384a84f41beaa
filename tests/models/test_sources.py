"""Rows from files, packages and folders; whatever else is named gives a ValueError that says what it is."""

import pytest
from datasets import Dataset

from csulora_callback.models.sources import locate, read_rows

BOM = b"\xef\xbb\xbf"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package with data, beside a file that is not its own."""
    folder = tmp_path / "some_prompts"
    (folder / "data").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "data/rows.csv").write_text("prompt\na\n")
    (tmp_path / "secret.txt").write_text("secret")
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def test_names_stay_inside_their_package(package):
    assert locate("some_prompts:data/rows.csv") == package / "data/rows.csv"
    for inside in ("../secret.txt", "data/../../secret.txt", str(package.parent / "secret.txt"), "..\\secret.txt", ""):
        with pytest.raises(ValueError, match=r"expected a file inside the package 'some_prompts', but got") as raised:
            locate(f"some_prompts:{inside}")
        assert repr(inside) in str(raised.value)


def test_files_of_a_package_may_be_links(package):
    """As some installers leave them."""
    (package / "data/link.txt").symlink_to(package.parent / "secret.txt")
    assert read_rows("some_prompts:data/link.txt")["text"][:] == ["secret"]


NO_SOURCES = {
    "empty": ("", "no such file or folder, and not a Hub id: ''"),
    "blank": (" ", "no such file or folder, and not a Hub id: ' '"),
    "overlong": ("x" * 5000, "no such file or folder, and not a Hub id"),
    "overlong file": ("x" * 5000 + ".csv", "no such file"),
    "overlong package": ("x" * 5000 + ":a.csv", "no installed package"),
    "overlong in a package": ("some_prompts:" + "x" * 5000, "no file"),
    "NUL": ("a\0b", "no such file or folder, and not a Hub id"),
    "NUL in a package": ("some_prompts:a\0.csv", "no file 'a\\x00.csv' in the package 'some_prompts'"),
    "no character": ("\ud800", "no such file or folder, and not a Hub id"),
    "a module that is no package": ("sys:a.csv", "no installed package 'sys'"),
    "the program itself": ("__main__:a.csv", "no installed package '__main__'"),
    "a folder in a package": ("some_prompts:data", "no file 'data' in the package 'some_prompts'"),
}


@pytest.mark.parametrize("case", NO_SOURCES)
def test_names_that_are_no_source(package, case):
    source, message = NO_SOURCES[case]
    with pytest.raises(ValueError, match=r"^no ") as raised:
        read_rows(source)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", b"one\ntwo\n"),
        ("a.csv", b"text,kind\none,x\ntwo,y\n"),
        ("quoted.csv", b'"text",kind\none,x\ntwo,y\n'),
        ("a.jsonl", b'{"text": "one"}\n{"text": "two"}\n'),
        ("a.json", b'[{"text": "one"}, {"text": "two"}]'),
    ],
)
def test_a_byte_order_mark_is_part_of_no_row_and_no_column(tmp_path, name, text):
    for mark in (b"", BOM):
        (tmp_path / name).write_bytes(mark + text)
        rows = read_rows(str(tmp_path / name))
        assert rows.column_names[0] == "text"
        assert rows["text"][:] == ["one", "two"]


BROKEN = {
    "empty.txt": (b"", "not txt that can be read as a table"),
    "empty.csv": (b"", "not csv that can be read as a table (it is empty)"),
    "empty.jsonl": (b"", "not jsonl that can be read as a table (it is empty)"),
    "empty.parquet": (b"", "not parquet that can be read as a table (it is empty)"),
    "blank.jsonl": (b"\n\n", "not jsonl that can be read as a table (it is empty)"),
    "list.json": (b" []", "not json that can be read as a table (it is an empty list)"),
    "header.csv": (b"prompt\n", "not csv that can be read as a table (there is no row below the header)"),
    "nothing but a mark.txt": (BOM, "not txt that can be read as a table (it is empty)"),
    "line.jsonl": (
        b'{"a": "b"}\n\n{"a": }\n',
        "not jsonl that can be read as a table (line 3, column 7: Expecting value)",
    ),
    "lines.json": (
        b'{"a": "b"}\n{"a": }\n',
        "not json that can be read as a table (line 2, column 7: Expecting value)",
    ),
    "items.json": (
        b'[{"a": "b"},\n{"a": }]',
        "not json that can be read as a table (line 2, column 7: Expecting value)",
    ),
    "object.json": (
        b'{\n"a": [{"b": }]\n}',
        "not json that can be read as a table (line 2, column 13: Expecting value)",
    ),
    "number.jsonl": (
        b'{"a": "b"}\n3',
        "not jsonl that can be read as a table (line 2: expected an object, but got 3)",
    ),
    "long rows.csv": (
        b"a,b\n1,2,3\n",
        "not csv that can be read as a table (ValueError: expected 2 fields in line 2, saw 3",
    ),
    "a long row.csv": (b"a,b\n1,2\n1,2,3\n", "not csv that can be read as a table (ParserError: "),
    "text.parquet": (b"text", "not parquet that can be read as a table (ArrowInvalid: "),
    "quote.csv": (b'prompt\n"one\n', "not csv that can be read as a table (ParserError: "),
    "deep.jsonl": (b'{"prompt": ' + b"[" * 2000 + b"]" * 2000 + b"}", "not jsonl that can be read as a table (Recurs"),
    "text.json": (b'"one"', "not json that can be read as a table"),
    "latin.txt": (b"caf\xe9\n", "expected a text file in UTF-8"),
    "latin.csv": (
        b"prompt\ncaf\xe9\n",
        "expected a text file in UTF-8, but it cannot be read as one (line 2: byte 0xe9",
    ),
    "latin.jsonl": (b'{"prompt": "caf\xe9"}\n', "expected a text file in UTF-8"),
    "wide.txt": ("one\n".encode("utf-16"), "expected a text file in UTF-8"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files(tmp_path, name):
    content, message = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"UTF-8|read as a table") as raised:
        read_rows(str(tmp_path / name))
    assert f"{tmp_path / name}: {message}" in str(raised.value)


def test_broken_folders(tmp_path):
    (tmp_path / "none.csv").mkdir()
    (tmp_path / "code").mkdir()
    (tmp_path / "code/code.py").write_text("raise SystemExit('executed')")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/a.csv").write_text("")
    for name in ("none.csv", "code", "broken"):
        with pytest.raises(ValueError, match=f"{name}: not a data set that can be read"):
            read_rows(str(tmp_path / name))


def test_nothing_in_a_file_is_guessed(tmp_path):
    """Cells of CSV are texts, and JSON beyond the reader's first ten megabytes is what it says."""
    (tmp_path / "a.csv").write_text('prompt,answer\n007,42\nNA,None\n"1, 2",\n3\n')
    rows = read_rows(str(tmp_path / "a.csv"))
    assert rows["prompt"][:] == ["007", "NA", "1, 2", "3"]
    assert rows["answer"][:] == ["42", "None", "", ""]

    (tmp_path / "long.jsonl").write_text(
        f'{{"cell": "{"x" * 1000}"}}\n' * 10_500 + '{"cell": 3}\n{"cell": [{"b": 1}]}'
    )
    assert read_rows(str(tmp_path / "long.jsonl"))["cell"][-2:] == [3, [{"b": 1}]]


def test_a_parquet_file(tmp_path):
    Dataset.from_dict({"prompt": ["a", None]}).to_parquet(tmp_path / "a.parquet")
    assert read_rows(str(tmp_path / "a.parquet"))["prompt"][:] == ["a", None]
