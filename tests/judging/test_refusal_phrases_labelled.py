"""How often the phrases are wrong on labelled data: the table in csulora_callback/README.md, measured again.

The rows are those that the PyPI package ``pyrit`` ships; they are read from it and not kept here. To measure again::

    pip install --no-deps pyrit==1.1.0    # or put its wheel on PYTHONPATH
    python -m pytest tests/judging/test_refusal_phrases_labelled.py

The phrases were chosen with one half of the responses in view, and are judged on the other.
"""

import csv
import hashlib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

from csulora_callback import RefusalPhrases, wilson_interval

VERSION = "1.1.0"
FOLDER = "pyrit/datasets/scorer_evals/refusal_scorer"


@pytest.fixture(scope="module")
def rows() -> list[tuple[str, bool]]:
    """Responses, and whether people call them refusals."""
    try:
        package = distribution("pyrit")
    except PackageNotFoundError:
        pytest.skip(f"the package pyrit is not installed (pip install --no-deps pyrit=={VERSION})")
    if package.version != VERSION:
        pytest.skip(f"pyrit is {package.version}, and the numbers were measured on {VERSION}")
    found = []
    for name in ("refusal.csv", "refusal_extra.csv"):
        with package.locate_file(f"{FOLDER}/{name}").open(encoding="utf-8", newline="") as file:
            table = csv.DictReader(line for line in file if not line.startswith("# "))
            found += [(row["assistant_response"], row["human_score"] == "1") for row in table]
    assert len(found) == 169
    return found


def reported(rows: list[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """The half of the rows that was not in view; equal responses are in the same half."""
    half = [row for row in rows if hashlib.sha256(row[0].encode()).digest()[0] % 2]
    assert len(half) == 76
    return half


def to_judge_by_text(rows: list[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """Every response once, and none of those that are refusals only as the answer to another question."""
    answers = {response for response, refused in rows if not refused}
    return list(dict.fromkeys(row for row in rows if not (row[1] and row[0] in answers)))


def errors(rows: list[tuple[str, bool]], mode: str) -> str:
    """``missed … of …, false alarms … of …``, with intervals in percent."""
    responses, refused = zip(*rows, strict=True)
    verdicts = RefusalPhrases(mode)(responses, responses)
    cells = []
    for of in (True, False):
        judged = [verdict != of for verdict, label in zip(verdicts, refused, strict=True) if label == of]
        lower, upper = wilson_interval(sum(judged), len(judged))
        cells.append(f"{sum(judged)} of {len(judged)} ({100 * lower:.0f}–{100 * upper:.0f} %)")
    return " | ".join(cells)


@pytest.mark.parametrize("mode", ["prefix", "anywhere"])
@pytest.mark.parametrize("kept", ["as labelled", "distinct, to judge by text"])
def test_error_rates_are_those_that_the_readme_states(rows, mode, kept):
    half = reported(rows)
    half = half if kept == "as labelled" else to_judge_by_text(half)
    line = f"| `{mode}` | {kept} | {errors(half, mode)} |"
    assert line in (Path(__file__).parents[2] / "csulora_callback/README.md").read_text(encoding="utf-8").splitlines()
