"""What the README says is supported is corrected, in each way to train, and what it says is not is refused by name.

What is saved is compared from outside: PEFT loads and merges it, and what it does to every weight is the closest safe
update, dense and in float64, of what the raw adapter does, by the weights that transformers loads in full precision.
"""

import ast
import re
from pathlib import Path

import pytest
import torch

from csulora_callback import CSULoRACallback, SafetySubspace, correct_adapter
from recipes.families.pair import RANK, Pair
from recipes.families.reference import check
from tests.helpers.lab import saved, saved_pair
from tests.helpers.supported import (
    AFTERWARDS,
    COLUMNS,
    CORRECTED,
    PENALTY,
    REFUSED,
    TRAINERS,
    corrected,
)

QUICK = {("LoRA", "Trainer")}
CASES = [
    pytest.param(row, column, marks=() if (row, column) in QUICK else pytest.mark.slow, id=f"{row}-{column}")
    for row in CORRECTED
    for column in COLUMNS
]
NONE_THERE = {("a second adapter that is trained", AFTERWARDS)}  # two have a folder each
REFUSALS = [
    pytest.param(row, column, marks=pytest.mark.slow, id=f"{row}-{column}")
    for row in REFUSED
    for column in COLUMNS
    if (row, column) not in NONE_THERE
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("row", "column"), CASES)
def test_corrected(row, column, tmp_path):
    make, build = CORRECTED[row]
    base = make()
    pair = saved_pair(tmp_path, base)
    folder = corrected(column, pair, build(pair[1]), tmp_path / "out")
    checked = check(Pair(*pair, type(base)), folder / "csulora/raw", folder)
    assert checked.matrices >= 3
    narrow = any(value.dtype != torch.float32 for value in saved(folder).values())  # as TRL makes those of QLoRA
    assert checked.worst < (1e-2 if narrow else 1e-5), checked.where
    assert not checked.lost
    assert not checked.new


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("row", "column"), REFUSALS)
def test_refused(row, column, tmp_path):
    make, build, word = REFUSED[row]
    pair = saved_pair(tmp_path, make())
    model = build(pair[1])
    if column in TRAINERS:
        callback = CSULoRACallback(pair[0], rank=RANK, penalty=PENALTY, cache_dir=tmp_path / "cache")
        with pytest.raises(ValueError, match=r"is not supported|expected an adapter of LoraConfig") as raised:
            TRAINERS[column](pair, model, tmp_path / "out", [callback])
    else:
        model.save_pretrained(tmp_path / "trained")
        subspace = SafetySubspace.estimate(*pair, ["q_proj"], rank=RANK, progress=False)
        with pytest.raises(ValueError, match=r"is not supported|expected an adapter of LoraConfig") as raised:
            correct_adapter(tmp_path / "trained", subspace, tmp_path / "out", PENALTY)
    assert word.lower() in str(raised.value).lower()
    assert not list((tmp_path / "out").rglob("adapter_model.*"))


def rows() -> tuple[dict[str, list[str]], dict[str, str]]:
    """Of the README's table: the cells by row, and the tests by number."""
    text = Path("csulora_callback/README.md").read_text(encoding="utf-8")
    table = text.split("<!-- supported -->")[1].split("<!-- end of supported -->")[0]
    lines = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("|")]
    head, _, *body = ([cell.strip() for cell in line] for line in lines)
    assert head[1:6] == [*COLUMNS, "engines"]
    return {cells[0]: cells[1:] for cells in body}, dict(re.findall(r"^(\d+)\. `(.*)`$", table, re.MULTILINE))


def test_the_readme_says_what_these_tests_show():
    shown, _ = rows()
    tried = {case.values: "yes" for case in CASES} | {case.values: "no" for case in REFUSALS}
    said = {(row, column): cell for row, cells in shown.items() for column, cell in zip(COLUMNS, cells, strict=False)}
    assert tried.keys() <= said.keys()
    for place, cell in said.items():
        assert cell == tried.get(place, "–") or re.fullmatch(r"(yes|no) \([\d, ]+\)", cell), place
    assert all(cells[5] for row, cells in shown.items() if "no" in cells), "each refusal says why, and what helps"


def test_each_number_in_that_table_is_a_test_that_exists():
    shown, tests = rows()
    lists = [found for cells in shown.values() for found in re.findall(r"\((\d[\d, ]*)\)", " ".join(cells))]
    assert {number for found in lists for number in found.split(", ")} == tests.keys()
    for place in tests.values():
        file, _, name = place.partition("::")
        assert name in [node.name for node in ast.parse(Path(file).read_text()).body if hasattr(node, "name")], place
