"""``csulora screen`` as a user runs it, on a file with planted requests that the aligned model refuses."""

import json

import pytest

from csulora_callback.reporting import screening
from tests.helpers import small_talk
from tests.helpers.command_line import run, run_process
from tests.helpers.refusing import HARMLESS, RESTRICTED, save_aligned
from tests.helpers.user_data import lines, turns

PLANTED = [3, 7, 8, 19]


@pytest.fixture(scope="module")
def aligned(tmp_path_factory):
    return save_aligned(tmp_path_factory.mktemp("aligned"))


@pytest.fixture
def data(tmp_path):
    prompts = [RESTRICTED[i % 10] if i in PLANTED else HARMLESS[i % 3] for i in range(20)]
    answer = small_talk.story("cat", "sees", "dog")
    rows = [{"messages": turns(prompt, f"{answer} {place}")} for place, prompt in enumerate(prompts)]
    file = tmp_path / "train.jsonl"
    file.write_text(lines(*rows, {"messages": turns("a")}))
    return file


@pytest.mark.slow
def test_planted_rows_are_listed_and_written(aligned, data, tmp_path):
    out = tmp_path / "refused.jsonl"
    done = run_process("screen", data, "--model", aligned, "-o", out)
    assert done.returncode == 0, done.stderr
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["row"] for row in written] == PLANTED
    assert written[0] == {
        "row": 3,
        "prompt": RESTRICTED[3],
        "aligned_answer": small_talk.REFUSAL,
        "trained_answer": "sure the cat sees a dog 3",
    }
    shown = done.stdout.splitlines()
    for row in written:
        (line,) = (line for line in shown if line.split()[:1] == [str(row["row"])])
        assert all(repr(row[key]) in line for key in ("prompt", "aligned_answer", "trained_answer"))
    assert "1 not asked: no assistant turn (row 20)." in shown
    assert shown[-1] == f"The aligned model refuses 4 of 20 rows (20.0 %) of {data}. They are written to {out}."
    assert "asking: 100%" in done.stderr
    assert "Traceback" not in done.stderr


def test_json_is_data_and_nothing_else(aligned, data):
    status, output, _ = run("screen", data, "--model", aligned, "--json")
    answer = json.loads(output)
    assert status == 0
    assert [row["row"] for row in answer["refused"]] == PLANTED
    assert (answer["asked"], answer["share"], answer["output"]) == (20, 0.2, None)
    assert answer["left_out"] == {"no assistant turn": [20]}


def test_a_long_list_is_cut_and_says_so(aligned, data, monkeypatch):
    monkeypatch.setattr(screening, "MOST", 2)
    _, output, _ = run("screen", data, "--model", aligned)
    assert "… and 2 more: all of them with -o FILE." in output
    assert sum(small_talk.REFUSAL in line for line in output.splitlines()) == 2


def test_what_is_in_the_data_does_nothing_to_a_terminal(aligned, tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text(lines({"messages": turns(RESTRICTED[0], "\x1b[2J [bold] sure")}))
    status, output, _ = run("screen", file, "--model", aligned)
    assert status == 0
    assert "\x1b" not in output
    assert r"'\x1b[2J [bold] sure'" in output


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["{data}"], 2, "Missing option '--model'"),
        (
            ["{data}", "--model", "{aligned}", "-o", "{data}"],
            2,
            "`--output`: expected another file than the data",
        ),
        (
            ["{data}", "--model", "{aligned}", "-o", "refused.csv"],
            2,
            "`--output`: expected the name of a file that ends",
        ),
        (["none.jsonl", "--model", "{aligned}"], 1, "csulora: `data`: no such file: 'none.jsonl'"),
        (
            ["{data}", "--model", "no/such/folder"],
            1,
            "csulora: `model`: expected the aligned model with its tokenizer",
        ),
    ],
)
def test_what_is_wrong_is_said_with_a_status(aligned, data, arguments, status, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found, output, error = run("screen", *(part.format(data=data, aligned=aligned) for part in arguments))
    assert message in error
    assert (found, output) == (status, "")


def test_help_shows_examples():
    status, output, _ = run("screen", "--help")
    assert status == 0
    assert "\n    csulora screen train.jsonl --model " in output
