"""Recipes: every shipped file is valid, bad ones get one clear line, and both kinds of task run end to end."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from csulora_callback.sidecar import read_record
from recipes.files.recipe import load_recipe
from recipes.labs.toy import IDS, Language, Samples
from recipes.run import main
from recipes.schema.recipe import RecipeError
from recipes.training.task import batches, build_task
from tests.helpers.recipes import SMALL, chat_tokenizer, starter

# Those of SmolLM2 need packages that ship it and prompts; test_smollm2 has them.
SHIPPED = sorted(path for path in Path("recipes").glob("*.yaml") if not path.stem.startswith("smollm2"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_recipe_passes_its_dry_run(path, capsys):
    assert main([str(path), "--dry-run"]) == 0
    assert "dry run: the recipe is valid" in capsys.readouterr().out


def test_dry_run_says_where_things_come_from_and_writes_nothing(tmp_path, capsys):
    output = tmp_path / "out"
    assert main(["recipes/llama32_1b_sft.yaml", "--dry-run", f"output={output}"]) == 0
    printed = capsys.readouterr().out
    assert "meta-llama/Llama-3.2-1B-Instruct (Hub" in printed
    assert "trl-lib/Capybara (Hub" in printed
    assert "guard (strength 10), rank: a thirty-second" in printed
    assert not output.exists()


@pytest.mark.parametrize(
    ("override", "shown"),
    [("rank=8", "rank: 8"), ("rank=null", "rank: a thirty-second"), ("energy=0.5", "rank: 50.0 % of the energy")],
)
def test_a_dry_run_says_the_rank_of_a_correction(capsys, override, shown):
    assert main(["recipes/llama32_1b_sft.yaml", "--dry-run", f"corrections.guard.{override}"]) == 0
    assert f"guard (strength 10), {shown}" in capsys.readouterr().out


def test_overrides_win_over_the_file():
    recipe = load_recipe("recipes/quickstart.yaml", ["corrections.guard.strength=inf", "training.seed=5"])
    assert recipe.corrections["guard"].strength == float("inf")
    assert recipe.training.seed == 5
    assert recipe.corrections["csulora"].strength == 10


def test_evaluation_prompts_are_held_out_and_labels_cover_the_answer():
    language = Language(seed=0)
    first, second = language.draw(300, ["copy"]), language.draw(300, ["copy"])
    other = Language(seed=0, drawn=[sample.prompt for sample in first]).draw(300, ["copy"])
    assert not {sample.prompt for sample in first} & {sample.prompt for sample in second + other}
    item = Samples(first)[0]
    assert [token for token in item["labels"].tolist() if token != -100] == [IDS[word] for word in first[0].answer]
    refused = Samples(language.draw(1, ["copy"], restricted=True, refused=True))[0]
    assert refused["input_ids"].shape == item["input_ids"].shape


def check_output(folder: Path, runs: list[str]) -> list[dict]:
    rows = json.loads((folder / "results.json").read_text())
    assert len(rows) == 2 + len(runs)
    assert all(
        {"method", "strength", "attack_success_rate", "task_loss", "task_accuracy"} <= row.keys() for row in rows
    )
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for run in runs:
        assert any("csulora/attenuation" in record for record in records if record["run"] == run)
    trained = [run for run in runs if any("loss" in record for record in records if record["run"] == run)]
    assert len(trained) == 1, "all corrections are made of one training run"
    assert (folder / "drift.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "report.html").read_text(encoding="utf-8")
    for run in runs:
        assert f'aria-label="Energy by block, {run}.' in page
    assert all(f"{row['task_loss']:.3f}" in page for row in rows)
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("name", ["quickstart", "quickstart_lightning"])
def test_quickstart_at_a_small_size(tmp_path, capsys, name):
    overrides = [*SMALL, f"toy.cache_dir={tmp_path / 'cache'}", f"output={tmp_path / 'first'}"]
    assert main([f"recipes/{name}.yaml", *overrides]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^\W+guard\W+10\W", printed, re.MULTILINE)
    assert re.search(r"\W+success\W+refused\W+loss\W+accuracy\W", printed)  # under attack, harmless, task
    assert re.search(r"\W+attack\W+harmless\W+task\W+task\W", printed)
    assert "8 prompts each; 8 harmless " in " ".join(printed.split())
    rows = check_output(tmp_path / "first", ["csulora", "guard", "data_aware", "kept"])
    assert [row["strength"] for row in rows[:-1]] == [None, None, 10.0, 10.0, 10.0]
    kept = read_record(next((tmp_path / "first/kept").glob("*4*/")))["penalty"]
    assert rows[-1]["strength"] == kept["strength"]
    assert [row["method"] for row in rows] == ["aligned", "raw", "csulora", "guard", "data_aware", "kept"]

    # The resolved recipe beside the results runs again, from the cached lab, to the same numbers.
    built = sorted((tmp_path / "cache").rglob("*.safetensors"))
    times = [path.stat().st_mtime_ns for path in built]
    assert main([str(tmp_path / "first/recipe.yaml"), f"output={tmp_path / 'second'}"]) == 0
    assert [path.stat().st_mtime_ns for path in built] == times
    assert json.loads((tmp_path / "second/results.json").read_text()) == rows
    resolved = yaml.safe_load((tmp_path / "first/recipe.yaml").read_text())
    assert resolved["toy"]["base_steps"] == 5


def test_models_with_code_of_their_own_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda prompt: pytest.fail(f"asked: {prompt}"))
    overrides = starter(tmp_path)
    config = json.loads((tmp_path / "aligned/config.json").read_text())
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (tmp_path / "aligned/config.json").write_text(json.dumps({**config, **own}))
    (tmp_path / "aligned/own.py").write_text("raise SystemExit('executed')")
    assert main(["recipes/llama32_1b_sft.yaml", *overrides, f"output={tmp_path / 'out'}"]) == 2
    assert f"'model.aligned': {tmp_path / 'aligned'}: transformers does not load it without" in capsys.readouterr().err


def test_a_base_without_weights_is_refused_before_training(tmp_path, capsys):
    (tmp_path / "bse").mkdir()
    overrides = [*starter(tmp_path), f"model.base={tmp_path / 'bse'}", f"output={tmp_path / 'out'}"]
    assert main(["recipes/llama32_1b_sft.yaml", *overrides]) == 2
    assert f"'model.base': {tmp_path / 'bse'}: expected one of model.safetensors" in capsys.readouterr().err
    assert not list(tmp_path.glob("out/**/checkpoint-*"))


@pytest.mark.slow
def test_a_language_that_is_used_up_says_so():
    with pytest.raises(RecipeError, match="no more new requests"):
        Language(seed=0).draw(40_000, ["copy"])


def test_one_row_leaves_none_to_judge_by(tmp_path, capsys):
    overrides = starter(tmp_path)
    (tmp_path / "chat.jsonl").write_text((tmp_path / "chat.jsonl").read_text().splitlines()[0])
    assert main(["recipes/llama32_1b_sft.yaml", *overrides, f"output={tmp_path / 'out'}"]) == 2
    assert "'data.eval_share': expected a share that leaves rows" in capsys.readouterr().err


def test_end_tokens_are_learned_and_padding_is_not(tmp_path):
    overrides = starter(tmp_path)
    tokenizer = chat_tokenizer()
    tokenizer.pad_token = None  # as Llama's: its end token then pads
    tokenizer.save_pretrained(tmp_path / "aligned")
    talks = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": text}] for text in ("a", "a b c")]
    (tmp_path / "chat.jsonl").write_text("\n".join(json.dumps({"messages": talk}) for talk in 2 * talks))
    recipe = load_recipe("recipes/llama32_1b_sft.yaml", [*overrides, "data.eval_share=0.75"])
    task = build_task(recipe)
    (batch,) = batches(task, recipe, task.held_out)
    for row, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        assert torch.equal(labels, row.where(mask.bool(), -100))
        assert (labels == task.tokenizer.eos_token_id).sum() == 2
    assert set((batch["attention_mask"].sum(1)).tolist()) == {8, 10}


@pytest.mark.slow
def test_only_what_reads_probes_keeps_them(tmp_path, capsys):
    overrides = [*SMALL, f"toy.cache_dir={tmp_path / 'cache'}", f"output={tmp_path / 'out'}"]
    assert main(["recipes/quickstart.yaml", *overrides]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^\W+data_aware\W+10\W", printed, re.MULTILINE)
    assert "64 prompts to be refused" in printed
    check_output(tmp_path / "out", ["csulora", "guard", "data_aware", "kept"])
    texts = json.loads((tmp_path / "out/data_aware/checkpoint-4/csulora/texts.json").read_text())
    assert len(texts["probes"]) == 64
    assert not (tmp_path / "out/guard/checkpoint-4/csulora/texts.json").exists()


@pytest.mark.parametrize("trainer", ["huggingface", "lightning"])
def test_the_path_of_a_real_pair_runs_offline_on_a_tiny_one(tmp_path, trainer):
    overrides = [
        *starter(tmp_path),
        "training.max_steps=4",
        "training.logging_steps=1",
        "training.eval_steps=2",
        "training.save_steps=2",
        "training.bf16=false",
        "corrections.guard.rank=2",
        f"trainer={trainer}",
        f"output={tmp_path / 'out'}",
    ]
    assert main(["recipes/llama32_1b_sft.yaml", *overrides]) == 0
    rows = check_output(tmp_path / "out", ["guard"])
    assert all(row["attack_success_rate"] is None for row in rows)
    aligned, raw, saved = (row["task_loss"] for row in rows)
    assert raw < saved < aligned  # the correction gives up a part of what was learned, here on random models
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "aligned").config.vocab_size == 32


def test_the_two_quickstarts_differ_in_nothing_but_the_trainer():
    one, other = (load_recipe(f"recipes/{name}.yaml", []) for name in ("quickstart", "quickstart_lightning"))
    assert dataclasses.replace(other, trainer=one.trainer, output=one.output) == one


def test_a_missing_lightning_names_the_extra(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "lightning", None)
    monkeypatch.delitem(sys.modules, "recipes.training.lightning", raising=False)
    assert main(["recipes/quickstart_lightning.yaml", f"output={tmp_path}"]) == 2
    assert "pip install -c constraints.txt -e '.[recipes,lightning]'" in capsys.readouterr().err


@pytest.mark.slow
def test_quickstart_at_full_size_gives_a_lab_that_shows_the_problem(tmp_path):
    """The lab does what its words say; what the corrections do to it is reported, not asserted."""
    overrides = [f"output={tmp_path / 'out'}", f"toy.cache_dir={tmp_path / 'cache'}"]
    assert main(["recipes/quickstart.yaml", *overrides]) == 0
    aligned, raw, *_ = check_output(tmp_path / "out", ["csulora", "guard", "data_aware", "kept"])
    assert aligned["attack_success_rate"] < 0.1
    assert raw["attack_success_rate"] > 0.5
    assert raw["task_accuracy"] > aligned["task_accuracy"] + 0.3
