"""A user's own data: every format is recognized, gives the tokens that TRL trains on, and trains in both trainers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Features, List, Value
from trl import SFTConfig, SFTTrainer

from csulora_callback.models.conversations import FORMATS, convert, recognize
from recipes.files.recipe import load_recipe
from recipes.run import main
from recipes.schema.recipe import Data, RecipeError
from recipes.training import preview
from recipes.training.examples import Examples, load_tokenizer, make_examples, read_user_rows
from recipes.training.task import batches, build_task, training_rows
from tests.helpers.lab import tiny_llama
from tests.helpers.recipes import chat_tokenizer, starter
from tests.helpers.user_data import ANSWER, QUESTION, SAID, dry_run, lines, turns

WHOLE = f"user : {QUESTION} <eos> assistant : {ANSWER} <eos>"
SHORT = [
    "training.max_steps=4",
    "training.logging_steps=1",
    "training.eval_steps=2",
    "training.save_steps=2",
    "training.bf16=false",
    "corrections.guard.rank=2",
]
RECOGNIZED = {
    "messages": "chat messages (messages)",
    "sharegpt": "ShareGPT (conversations)",
    "sharegpt_roles": "ShareGPT (conversations)",
    "texts": "prompt/completion, texts (prompt, completion)",
    "conversational": "prompt/completion, conversations (prompt, completion)",
    "alpaca": "Alpaca (instruction, input, output)",
    "alpaca_alone": "Alpaca (instruction, input, output)",
}
LEARNED_WHOLE = ("messages", "sharegpt", "sharegpt_roles")


def some(*fast: str, among=SAID) -> list:
    """Parameters of a test: all of them, and those of the fast suite."""
    return [pytest.param(name, marks=[] if name in fast else pytest.mark.slow) for name in among]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A tiny pair; the overrides that name it."""
    return starter(tmp_path_factory.mktemp("pair"))


def examples(path, rows: list[dict], max_length: int = 32) -> Examples:
    """What a file of rows is trained on."""
    path.write_text(lines(*rows))
    return make_examples(read_user_rows(Data(source=str(path))), chat_tokenizer(), max_length)


def test_every_format_has_an_example():
    assert {recognize(list(row), row).name for row in SAID.values()} >= {form.name for form in FORMATS}
    assert set(RECOGNIZED) == set(SAID)


@pytest.mark.parametrize("name", SAID)
def test_formats_that_say_the_same_give_the_same_tokens(tmp_path, name):
    (row,) = examples(tmp_path / "a.jsonl", [SAID[name]]).rows
    tokenizer = chat_tokenizer()
    assert row["input_ids"] == tokenizer(WHOLE).input_ids
    answer = tokenizer(f"assistant : {ANSWER} <eos>").input_ids
    question = len(row["input_ids"]) - len(answer)
    assert row["labels"] == (row["input_ids"] if name in LEARNED_WHOLE else [-100] * question + answer)


def test_a_generation_prompt_is_not_learned(tmp_path):
    tokenizer = chat_tokenizer()
    tokenizer.chat_template += "{% if add_generation_prompt %}assistant : {% endif %}"
    for name in ("conversational", "alpaca"):
        (tmp_path / name).with_suffix(".jsonl").write_text(lines(SAID[name]))
        user = read_user_rows(Data(source=str(tmp_path / f"{name}.jsonl")))
        (row,) = make_examples(user, tokenizer, 32).rows
        assert [token for token in row["labels"] if token != -100] == tokenizer(f"{ANSWER} <eos>").input_ids


@pytest.mark.parametrize("name", some("conversational", among=["messages", "texts", "conversational"]))
def test_tokens_and_labels_are_those_of_trl(tmp_path, name):
    """Prepared by its SFTTrainer from the rows themselves, and what we prepare is left as it is; some rows are cut."""
    longer = {
        "messages": {"messages": [{"role": "system", "content": "d"}, *turns(QUESTION, "a b", "c", "a " * 20)]},
        "texts": {"prompt": "a b ", "completion": "c <eos>"},
        "conversational": {"prompt": turns("a", "b", "c"), "completion": turns("a", "a " * 20)[1:]},
    }
    rows = [SAID[name], longer[name]]
    ours = examples(tmp_path / "a.jsonl", rows, max_length=20).rows
    for given in (Dataset.from_list(rows), ours):
        arguments = SFTConfig(str(tmp_path), max_length=20, use_cpu=True, report_to=[], bf16=False)
        trainer = SFTTrainer(tiny_llama(), arguments, train_dataset=given, processing_class=chat_tokenizer())
        for column in ("input_ids", "labels"):
            assert trainer.train_dataset[column][:] == ours[column][:]
    batch = trainer.get_train_dataloader().collate_fn([ours[0], ours[1]])
    assert batch["labels"].shape == batch["input_ids"].shape


def test_a_system_text_and_an_input_are_part_of_the_prompt(tmp_path):
    full = {"instruction": "a", "input": "b", "output": "c", "system": "d"}
    rows = [full, {**full, "input": None, "system": None}]
    one, other = examples(tmp_path / "a.jsonl", rows).rows
    decode = chat_tokenizer().decode
    assert decode(one["input_ids"]) == "<unk> : d <eos> user : a b <eos> assistant : c <eos>"
    assert decode(other["input_ids"]) == "user : a <eos> assistant : c <eos>"
    assert convert(recognize(list(full), full), full)["prompt"][1]["content"] == "a\nb"


def test_rows_with_nothing_to_learn_are_counted(tmp_path):
    rows = [
        {"messages": turns("a")},  # nobody answers
        SAID["messages"],
        {"messages": turns("a", "")},
        {"messages": turns("a " * 40, "b")},  # the answer lies beyond
        {"messages": turns("a", "b " * 40)},  # cut
        {"messages": [{"role": "system", "content": ""}, *turns("a", "b")]},  # no system prompt
        {"messages": turns("a", " ")},
    ]
    made = examples(tmp_path / "a.jsonl", rows)
    assert made.left_out == {"no assistant turn": [1], "empty text": [3, 7], "no answer within data.max_length": [4]}
    assert made.cut == 1
    assert made.summary() == (
        "3 to learn from, of 11 to 32 tokens, 1 of them cut there; 1 left out: no assistant turn (row 1); "
        "2 left out: empty text (row 3 first); 1 left out: no answer within data.max_length (row 4)"
    )
    assert [len(ids) for ids in made.rows["input_ids"]] == [12, 32, 11]


def test_messages_keep_what_else_they_say(tmp_path):
    """For the template; where a table gives all messages all keys, those without a value are other messages'."""
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{% for key in m %}{{ m[key] }} {% endfor %}{% endfor %}"
    talks = [
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "mood": "c"}],
        [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
    ]
    keys = {key: Value("string") for key in ("role", "content", "mood", "from", "value")}
    rows = Dataset.from_dict({"messages": talks}, features=Features({"messages": List(keys)}))
    rows.to_parquet(tmp_path / "a.parquet")
    assert rows[0]["messages"][0].keys() == keys.keys()
    made = make_examples(read_user_rows(Data(source=str(tmp_path / "a.parquet"))), tokenizer, 32).rows
    assert [tokenizer.decode(row["input_ids"]) for row in made] == ["user a assistant b c", "user a assistant b"]


def test_columns_of_several_formats(tmp_path):
    """The first format in which the first row has something; the others' columns are named as ignored."""
    both = {**SAID["alpaca"], **SAID["messages"], "topic": "x"}
    (tmp_path / "a.jsonl").write_text(lines(both))
    user = read_user_rows(Data(source=str(tmp_path / "a.jsonl")))
    assert (user.form.name, user.ignored) == ("chat messages", ["instruction", "input", "output", "topic"])
    (tmp_path / "b.jsonl").write_text(lines({**both, "messages": None}))
    assert read_user_rows(Data(source=str(tmp_path / "b.jsonl"))).form.name == "Alpaca"


@pytest.mark.parametrize("name", some("messages", "texts", "alpaca"))
def test_a_dry_run_shows_the_format_and_how_a_row_reads(pair, tmp_path, capsys, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "a.jsonl").write_text(lines(*[{**SAID[name], "id": 1}] * 3))
    assert dry_run(tmp_path / "a.jsonl", pair) == 0
    printed = capsys.readouterr().out
    cells = dict([cell.strip() for cell in line.split("│")[1:3]] for line in printed.splitlines() if "│" in line)
    assert cells["format"] == f"{RECOGNIZED[name]}; ignored: id"
    assert cells["rows"] == "3 to learn from, of 12 tokens"
    assert cells["the first, 12 tokens"] == WHOLE
    learned = 12 if name in LEARNED_WHOLE else 6
    answer = "all of it" if name in LEARNED_WHOLE else f"assistant : {ANSWER} <eos>"
    assert cells[f"learned of it, {learned} tokens"] == answer


def test_the_page_shows_what_is_printed(pair, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    row = {"instruction": "a b", "input": "c", "output": "d", "id": 1}
    rows = [*[row] * 5, {**row, "output": ""}, {**row, "output": "x " * 40}]
    (tmp_path / "a.jsonl").write_text(lines(*rows))
    assert dry_run(tmp_path / "a.jsonl", pair) == 0
    _, row, rest = capsys.readouterr().out.partition("│ format ")
    shown, _, _ = rest.partition("│ trainer ")
    assert row + shown in Path("recipes/README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_other_kinds_of_files(pair, tmp_path, capsys):
    rows = Dataset.from_list([SAID["messages"]] * 3)
    rows.to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(json.dumps([SAID["messages"]] * 3, indent=1))
    (tmp_path / "a.csv").write_text("instruction,output\n" + f'"{QUESTION}",{ANSWER}\n' * 3)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/train.jsonl").write_text(lines(*[SAID["messages"]] * 3))
    for name in ("a.parquet", "a.json", "a.csv", "folder"):
        assert dry_run(tmp_path / name, pair) == 0
        assert "3 to learn from, of 12 tokens" in capsys.readouterr().out


def test_a_dry_run_reads_the_first_rows_of_a_long_file(pair, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(preview, "_ROWS", 3)
    (tmp_path / "a.jsonl").write_text(lines(*[SAID["texts"]] * 4, {**SAID["texts"], "completion": None}))
    assert dry_run(tmp_path / "a.jsonl", pair) == 0
    assert "the first 3 of 5: 3 to learn from, of 12 tokens" in capsys.readouterr().out
    with pytest.raises(RecipeError, match="row 5: column 'completion': expected a text, but got nothing"):
        build_task(load_recipe("recipes/llama32_1b_sft.yaml", [*pair, f"data.source={tmp_path / 'a.jsonl'}"]))


def test_a_dry_run_without_the_models_tokenizer_checks_the_format(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "a.jsonl").write_text(lines(SAID["alpaca"]))
    assert dry_run(tmp_path / "a.jsonl", ["model.aligned=nobody/nothing"]) == 0
    assert "all of this format; the model's tokenizer, which counts them, is not here" in capsys.readouterr().out
    (tmp_path / "b.jsonl").write_text(lines(SAID["alpaca"], {**SAID["alpaca"], "output": 3}))
    assert dry_run(tmp_path / "b.jsonl", ["model.aligned=nobody/nothing"]) == 2
    assert "row 2: column 'output': expected a text, but got 3" in capsys.readouterr().err


def test_what_a_terminal_would_obey_is_not_printed(pair, tmp_path, capsys):
    tokenizer = chat_tokenizer()
    tokenizer.add_tokens(["\x1b[31m[bold]"])
    tokenizer.save_pretrained(tmp_path / "aligned")
    (tmp_path / "a.jsonl").write_text(lines({"messages": turns("\x1b[31m[bold]", "a")}))
    assert dry_run(tmp_path / "a.jsonl", [*pair, f"model.aligned={tmp_path / 'aligned'}"]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "[31m[bold]" in printed


def test_a_tokenizer_without_a_chat_template(pair, tmp_path, capsys):
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "aligned")
    for name in ("messages", "texts", "alpaca"):
        (tmp_path / "a.jsonl").write_text(lines(SAID[name]))
        status = dry_run(tmp_path / "a.jsonl", [*pair, f"model.aligned={tmp_path / 'aligned'}"])
        assert status == (0 if name == "texts" else 2)
        expected = (
            f"'model.aligned': {tmp_path / 'aligned'}: expected a tokenizer with a chat template, but it has none"
        )
        assert (expected in capsys.readouterr().err) == bool(status)
    with pytest.raises(RecipeError, match="transformers does not load it"):
        load_tokenizer(str(tmp_path), FORMATS[0])


def test_rows_keep_their_numbers_where_some_are_drawn(pair, tmp_path, capfd):
    (tmp_path / "a.jsonl").write_text(lines(*[SAID["alpaca"]] * 20, {**SAID["alpaca"], "output": ["a"]}))
    overrides = [*pair, f"data.source={tmp_path / 'a.jsonl'}", f"output={tmp_path / 'out'}", "data.max_samples=21"]
    assert main(["recipes/llama32_1b_sft.yaml", *overrides]) == 2
    assert capfd.readouterr().err.endswith("row 21: column 'output': expected a text, but got ['a']\n")
    assert not (tmp_path / "out/guard").exists()


def test_what_is_judged_and_measured_is_what_is_trained(pair, tmp_path):
    (tmp_path / "a.jsonl").write_text(lines(*[SAID["alpaca"]] * 10))
    recipe = load_recipe("recipes/llama32_1b_sft.yaml", [*pair, f"data.source={tmp_path / 'a.jsonl'}"])
    task = build_task(recipe)
    whole = chat_tokenizer()(WHOLE).input_ids
    sample = training_rows(task, recipe)
    assert (sample.rows, sample.starts, sample.seen) == ([whole] * 8, [6] * 8, 8)
    (batch,) = batches(task, recipe, task.held_out)
    assert batch["input_ids"].tolist() == [whole] * 2
    assert torch.equal(batch["labels"][:, 6:], batch["input_ids"][:, 6:])
    assert (batch["labels"][:, :6] == -100).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", SAID)
def test_every_format_trains_in_both_trainers(pair, tmp_path, capsys, name):
    """The aligned model is judged on the same tokens in both, so that its loss agrees; both learn something."""
    (tmp_path / "a.jsonl").write_text(lines(*[SAID[name]] * 40, {**SAID[name], **EMPTY[name]}))
    results = {}
    for trainer in ("huggingface", "lightning"):
        output = tmp_path / trainer
        overrides = [*pair, *SHORT, f"data.source={tmp_path / 'a.jsonl'}", f"trainer={trainer}", f"output={output}"]
        assert main(["recipes/llama32_1b_sft.yaml", *overrides]) == 0
        form = RECOGNIZED[name].partition(" (")[0]
        told = f"{tmp_path / 'a.jsonl'}, {form}: 40 to learn from, of 12 tokens; 1 left out: empty text (row 41)\n"
        assert told in capsys.readouterr().out
        results[trainer] = [row["task_loss"] for row in json.loads((output / "results.json").read_text())]
    assert results["huggingface"][0] == pytest.approx(results["lightning"][0], rel=1e-6)
    for aligned, raw, saved in results.values():
        assert raw < saved < aligned


EMPTY = {
    "messages": {"messages": turns(QUESTION, "")},
    "sharegpt": {"conversations": turns(QUESTION, "")},
    "sharegpt_roles": {"conversations": turns(QUESTION, "")},
    "texts": {"completion": ""},
    "conversational": {"completion": turns(QUESTION, "")[1:]},
    "alpaca": {"output": ""},
    "alpaca_alone": {"output": ""},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SAID)
def test_broken_rows_stop_a_run_before_a_model_is_loaded(pair, tmp_path, name):
    """As the user starts it; the pair has no weights."""
    for folder in ("base", "aligned"):
        chat_tokenizer().save_pretrained(tmp_path / folder)
    models = [f"model.{folder}={tmp_path / folder}" for folder in ("base", "aligned")]
    broken = {column: 3 for column in SAID[name] if column in ("messages", "conversations", "completion", "output")}
    (tmp_path / "a.jsonl").write_text(lines(*[SAID[name]] * 5, {**SAID[name], **broken}))
    command = [sys.executable, "-m", "recipes.run", "recipes/llama32_1b_sft.yaml", *pair, *models]
    command += [f"data.source={tmp_path / 'a.jsonl'}", f"output={tmp_path / 'out'}"]
    for flags in ([], ["--dry-run"]):
        done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert f"row 6: column '{next(iter(broken))}': expected a" in done.stderr.splitlines()[-1]
    assert done.stderr.count("\n") == 1
    assert not done.stdout
