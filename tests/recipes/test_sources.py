"""Data from local files and from installed packages; and what is no source gets one line."""

import pytest

from recipes.files.sources import locate, prompts_of, read
from recipes.schema.recipe import RecipeError


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package with data, whose code must not run."""
    folder = tmp_path / "some_prompts"
    (folder / "data").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "data" / "rows.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    (folder / "data" / "rows.csv").write_text("prompt,kind\na,x\nb,y\n")
    (folder / "data" / "rows.pkl").write_bytes(b"never opened")
    monkeypatch.syspath_prepend(tmp_path)
    return folder


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_a_file_of_a_package_is_the_file(package, name):
    assert locate("data.source", f"some_prompts:data/{name}") == package / "data" / name
    assert list(read("data.source", f"some_prompts:data/{name}")["prompt"]) == ["a", "b"]
    assert list(read("data.source", str(package / "data" / name))["prompt"]) == ["a", "b"]


BAD = {
    "no such package": ("no_prompts:data/rows.csv", "'data.source': no installed package 'no_prompts'"),
    "no such file in it": (
        "some_prompts:data/row.csv",
        "no file 'data/row.csv' in the package 'some_prompts'; did you mean 'data/rows.csv'?",
    ),
    "code in the file": (
        "some_prompts:data/rows.pkl",
        "expected a file that ends in one of .json, .jsonl, .csv",
    ),
    "no such local file": ("missing.csv", "'data.source': no such file: 'missing.csv'"),
    "nothing at all": ("a/b/c", "no such file or folder, and not a Hub id: 'a/b/c'"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_source_gets_one_line(package, case):
    source, message = BAD[case]
    with pytest.raises(RecipeError) as raised:
        read("data.source", source)
    assert message in str(raised.value)


def test_a_hub_id_is_left_to_the_hub():
    assert locate("data.source", "trl-lib/Capybara") is None


def test_prompts_are_lines_or_a_column(tmp_path):
    files = {
        "probes.txt": "one\n\n two \n",
        "probes.jsonl": '{"prompt": "one"}\n{"prompt": "two"}\n',
        "probes.csv": "prompt,source\none,a\ntwo,b\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        probes = str(tmp_path / name)
        assert prompts_of("calibrate.attacks", probes, "prompt") == ["one", "two"]
    with pytest.raises(RecipeError, match=r"'data.probes_column': expected a column of .*\['prompt', 'source'\]"):
        prompts_of("data.probes", probes, "question")
    (tmp_path / "numbers.jsonl").write_text('{"prompt": 0}\n{"prompt": 1}\n')
    with pytest.raises(RecipeError, match=r"'calibrate.attacks': .*jsonl: expected texts in the column .* but got 0"):
        prompts_of("calibrate.attacks", str(tmp_path / "numbers.jsonl"), "prompt")
