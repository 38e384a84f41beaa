"""A whole file of rows in every format: which of them the aligned model refuses, against real generation."""

import csv
import json
import shutil
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from csulora_callback import screen_data
from csulora_callback.models.probes import read_prompts
from csulora_callback.screening import RefusedRow
from tests.helpers import small_talk
from tests.helpers.refusing import HARMLESS, RESTRICTED, is_refused, save_aligned
from tests.helpers.user_data import lines, sharegpt, turns

ANSWER = small_talk.story("cat", "sees", "dog")
PROMPTS = [HARMLESS[0], RESTRICTED[0], HARMLESS[1], RESTRICTED[3], RESTRICTED[0], HARMLESS[2]]
FORMATS = {
    "messages": lambda prompt: {"messages": turns(prompt, ANSWER)},
    "sharegpt": lambda prompt: {"conversations": sharegpt(prompt, ANSWER)},
    "texts": lambda prompt: {"prompt": prompt, "completion": ANSWER},
    "formatted": lambda prompt: {"prompt": f"<bos> {prompt} ?", "completion": ANSWER},
    "conversational": lambda prompt: {"prompt": turns(prompt), "completion": turns(prompt, ANSWER)[1:]},
    "alpaca": lambda prompt: {"instruction": prompt, "input": "", "output": ANSWER},
}


@pytest.fixture(scope="module")
def aligned(tmp_path_factory):
    return save_aligned(tmp_path_factory.mktemp("aligned"))


@pytest.mark.parametrize("name", FORMATS)
def test_refused_rows_are_those_that_generating_says_in_every_format(aligned, tmp_path, name):
    file = tmp_path / "rows.jsonl"
    file.write_text(lines(*map(FORMATS[name], PROMPTS)))
    done = screen_data(file, aligned, progress=False)
    words = AutoTokenizer.from_pretrained(aligned)
    verdicts = is_refused(aligned, [words(f"<bos> {prompt} ?").input_ids for prompt in PROMPTS])
    assert (
        [row.row for row in done.refused] == [place for place, refused in enumerate(verdicts) if refused] == [1, 3, 4]
    )
    shown = FORMATS[name](PROMPTS[1])["prompt"] if name == "formatted" else PROMPTS[1]
    assert done.refused[0] == RefusedRow(1, shown, small_talk.REFUSAL, ANSWER)
    assert (done.asked, done.share, done.left_out) == (6, 0.5, {})


@pytest.mark.parametrize("kind", [".json", ".csv", ".parquet"])
def test_every_kind_of_file_is_read(aligned, tmp_path, kind):
    rows, file = [FORMATS["texts"](prompt) for prompt in PROMPTS], (tmp_path / "rows").with_suffix(kind)
    if kind == ".json":
        file.write_text(json.dumps(rows))
    elif kind == ".parquet":
        Dataset.from_list(rows).to_parquet(file)
    else:
        with file.open("w", newline="") as table:
            writer = csv.DictWriter(table, ["prompt", "completion"])
            writer.writeheader()
            writer.writerows(rows)
    assert [row.row for row in screen_data(str(file), aligned, progress=False).refused] == [1, 3, 4]


def test_what_is_asked_of_a_longer_conversation_is_all_before_its_last_answer(aligned, tmp_path):
    talk = turns("tell of", "sure", RESTRICTED[0], ANSWER)
    file = tmp_path / "rows.jsonl"
    file.write_text(lines({"messages": [*talk, {"role": "user", "content": "a"}]}, FORMATS["messages"](HARMLESS[0])))
    done = screen_data(file, aligned, progress=False)
    words = AutoTokenizer.from_pretrained(aligned)
    ids = words(f"<bos> tell of ? sure <eos> {RESTRICTED[0]} ?").input_ids
    assert len(done.refused) == sum(is_refused(aligned, [ids])) == 1
    assert done.refused[0].prompt == f"user: tell of\nassistant: sure\nuser: {RESTRICTED[0]}"
    assert done.refused[0].trained_answer == ANSWER


def test_rows_that_ask_nothing_are_counted_by_reason(aligned, tmp_path):
    rows = [
        {"messages": turns(RESTRICTED[0], ANSWER)},
        {"messages": turns("a")},
        {"messages": turns(" ", ANSWER)},
        {"messages": turns("a", ANSWER)[1:]},
        {"messages": turns("a " * 17, ANSWER)},  # the model has 32 places
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text(lines(*rows))
    done = screen_data(file, aligned, progress=False)
    assert done.asked == len(done.refused) == 1
    assert done.left_out == {
        "no assistant turn": [1],
        "empty text": [2],
        "no prompt": [3],
        "a prompt longer than the model reads": [4],
    }
    file.write_text(lines(*rows[1:]))
    with pytest.raises(ValueError, match=r"^`data`: .*: expected rows with a prompt and an answer, but got none: "):
        screen_data(file, aligned, progress=False)


def test_what_is_written_can_serve_as_probes(aligned, tmp_path):
    file, out = tmp_path / "rows.jsonl", tmp_path / "new/refused.jsonl"
    file.write_text(lines(*map(FORMATS["messages"], PROMPTS)))
    screen_data(file, aligned, progress=False).save(out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["row"] for row in rows] == [1, 3, 4]
    assert {tuple(row) for row in rows} == {("row", "prompt", "aligned_answer", "trained_answer")}
    assert [row["prompt"] for row in rows] == [PROMPTS[place] for place in (1, 3, 4)]
    assert read_prompts(out) == list(dict.fromkeys(PROMPTS[place] for place in (1, 3, 4)))


def test_what_cannot_be_screened_is_said_by_argument_and_row(aligned, tmp_path):
    def refused(rows: str, message: str, model: object = aligned, name: str = "rows.jsonl") -> None:
        file = tmp_path / name
        file.write_text(rows)
        with pytest.raises(ValueError, match=message):
            screen_data(file, model, progress=False)

    good = FORMATS["messages"](PROMPTS[0])
    refused(lines({"text": "a"}), r"^`data`: .*rows.jsonl: expected the columns messages, or conversations")
    refused(lines(good, {"messages": "a"}), r"^`data`: .*rows.jsonl")
    broken = {"messages": [{"role": "critic", "content": "a"}]}
    refused(
        lines(good, broken), r"^`data`: .*rows.jsonl: row 1, counted from 0: column 'messages', message 1: expected"
    )
    refused("", r"^`data`: .*it is empty")
    refused(
        lines(good), r"^`model`: expected the aligned model with its tokenizer in 'no/such/folder'", "no/such/folder"
    )
    plain = Path(shutil.copytree(aligned, tmp_path / "plain"))
    (plain / "chat_template.jinja").unlink()
    refused(lines(good), r"^`model`: expected a tokenizer with a chat template in .*plain", plain)
    (tmp_path / "texts.jsonl").write_text(lines(*map(FORMATS["formatted"], PROMPTS)))
    assert len(screen_data(tmp_path / "texts.jsonl", plain, progress=False).refused) == 3  # needs none
