"""Recipes: every shipped file is valid, bad ones get one clear line, and both kinds of task run end to end."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from recipes.run import main
from recipes.schema import RecipeError, load_recipe
from recipes.task import batches, build_task
from recipes.toy import IDS, Language, Samples
from tests.lab import align, tiny_llama

# Those of SmolLM2 need packages that ship it and prompts; test_smollm2 has them.
SHIPPED = sorted(path for path in Path("recipes").glob("*.yaml") if not path.stem.startswith("smollm2"))
SMALL = [
    "toy.hidden_size=32",
    "toy.layers=2",
    "toy.base_steps=5",
    "toy.align_steps=5",
    "toy.train_samples=64",
    "toy.eval_prompts=8",
    "training.max_steps=4",
    "training.logging_steps=2",
    "training.eval_steps=2",
    "training.save_steps=2",
]


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
    assert not output.exists()


FRONTIER = "output: a\ntoy: {templates: 2}\ntraining: {max_steps: 1}\nfrontier:\n"

BAD = {
    "unknown key": ("output: a\ntraning: {}", [], "unknown key 'traning'; did you mean 'training'?"),
    "unknown nested key": (
        "output: a\ncorrections: {mine: {preset: guard, strenght: 3}}",
        [],
        "unknown key 'corrections.mine.strenght'; did you mean 'corrections.mine.strength'?",
    ),
    "wrong section": ("output: a\nlearning_rate: 1", [], "did you mean 'training.learning_rate'?"),
    "unknown key in an override": (
        "output: a",
        ["training.max_stepps=3"],
        "unknown key 'training.max_stepps'; did you mean 'training.max_steps'?",
    ),
    "wrong type": (
        "output: a\ntraining: {max_steps: many}",
        [],
        "'training.max_steps': Value 'many' of type 'str' could not be converted to Integer",
    ),
    "wrong choice": (
        "output: a\ntrainer: huggingfase",
        [],
        "'trainer': Invalid value 'huggingfase', expected one of",
    ),
    "not a section": ("output: a\ntraining: 3", [], "'training': expected a section with keys, but got 3"),
    "missing value": ("corrections: {mine: {preset: guard}}", [], "missing value: 'output' has to be set"),
    "missing preset": ("output: a\ncorrections: {mine: {rank: 3}}", [], "missing value: 'corrections.mine.preset'"),
    "no corrections": ("output: a", [], "missing value: 'corrections' needs at least one"),
    "half a pair": ("output: a\nmodel: {base: x}", [], "missing value: 'model.aligned'"),
    "pair without data": ("output: a\nmodel: {base: x, aligned: y}", [], "missing value: 'data.source'"),
    "out of range": (
        "output: a\ncorrections: {mine: {preset: guard, rank: 0}}",
        [],
        "'corrections.mine.rank': expected a whole number ≥ 1, but got 0",
    ),
    "wrong word": ("output: a\ntraining: {batch_sise: 3}", [], "did you mean 'training.batch_size'?"),
    "rank of zero": ("output: a\nlora: {r: 0}", [], "'lora.r': expected a whole number ≥ 1, but got 0"),
    "no learning": ("output: a", ["training.learning_rate=nan"], "'training.learning_rate': expected a number > 0"),
    "override of a section": ("output: a", ["training=3"], "'training': expected a section with keys, but got 3"),
    "list of corrections": ("output: a\ncorrections: [a]", [], "'corrections': expected a section with keys"),
    "no epochs": ("output: a", ["training.epochs=-1"], "'training.epochs': expected a number > 0"),
    "half an epoch": (
        "output: a\ntrainer: lightning",
        ["training.epochs=0.5"],
        "'training.epochs': expected a whole number in Lightning",
    ),
    "negative seed": ("output: a", ["training.seed=-1"], "'training.seed': expected a whole number ≥ 0, but got -1"),
    "path as a name": (
        "output: a\ncorrections: {a/b: {preset: guard}}",
        [],
        "'corrections': expected names that can be folder names, but got 'a/b'",
    ),
    "odd size": ("output: a", ["toy.hidden_size=130"], "'toy.hidden_size': expected a multiple of 8"),
    "dropout": ("output: a", ["lora.dropout=2"], "'lora.dropout': expected a share in [0, 1), but got 2.0"),
    "dtype": ("output: a", ["model.dtype=floaty"], "'model.dtype': expected one of ('auto', 'float32'"),
    "targets": ("output: a", ["lora.target_modules=3"], "'lora.target_modules': expected a list of names"),
    "step": (
        "output: a\ncorrections: {mine: {preset: guard, every_n_steps: 0}}",
        [],
        "'corrections.mine.every_n_steps': expected a whole number ≥ 1, but got 0",
    ),
    "unknown method": (
        f"{FRONTIER}  methods: {{scaling: [2], gaurd: [3]}}",
        [],
        "'frontier.methods': expected methods of recipes.baselines such as 'guard', but got 'gaurd'",
    ),
    "nothing to compare with": (
        f"{FRONTIER}  methods: {{guard: [3]}}",
        [],
        "'frontier.methods': expected 'scaling' among them, as all are compared with it, but got ['guard']",
    ),
    "no strengths": (
        f"{FRONTIER}  methods: {{scaling: []}}",
        [],
        "'frontier.methods.scaling': expected strengths > 0, at least one, but got []",
    ),
    "strengths of a method without": (
        f"{FRONTIER}  methods: {{scaling: [2], projection: [3]}}",
        [],
        "'frontier.methods.projection': expected no strengths, as this method has none, but got [3.0]",
    ),
    "decay": (
        f"{FRONTIER}  methods: {{scaling: [2], averaging: [1]}}",
        [],
        "'frontier.methods.averaging': expected decays < 1, but got [1.0]",
    ),
    "half a module": (
        f"{FRONTIER}  methods: {{scaling: [2], safe_lora_number: [0.5]}}",
        [],
        "'frontier.methods.safe_lora_number': expected whole numbers of modules, but got [0.5]",
    ),
    "a seed twice": (
        f"{FRONTIER}  methods: {{scaling: [2]}}",
        ["frontier.seeds=[1,1]"],
        "'frontier.seeds': expected different whole numbers ≥ 0, at least one, but got [1, 1]",
    ),
    "one template": (
        f"{FRONTIER}  methods: {{scaling: [2]}}",
        ["toy.templates=1"],
        "'toy.templates': expected 2, as both are judged, but got 1",
    ),
    "frontier and corrections": (
        f"{FRONTIER}  methods: {{scaling: [2]}}\ncorrections: {{mine: {{preset: guard}}}}",
        [],
        "'corrections': expected nothing beside 'frontier.methods', but got ['mine']",
    ),
    "three templates": ("output: a", ["toy.templates=3"], "'toy.templates': expected 1 or 2, but got 3"),
    "probes in the toy lab": (
        "output: a\ndata: {probes: a.txt}\ncorrections: {mine: {preset: data_aware}}",
        [],
        "'data.probes': expected nothing, as the toy lab has its own, but got 'a.txt'",
    ),
    "no probes": (
        "output: a\nmodel: {base: a/b, aligned: a/b}\ndata: {source: c/d}\ncorrections: {mine: {preset: data_aware}}",
        [],
        "'data.probes': expected prompts that are to be refused, for the preset data_aware, but got None",
    ),
    "data-aware without end": (
        "output: a\ncorrections: {mine: {preset: data_aware, strength: .inf}}",
        [],
        "'corrections.mine.strength': expected at most 1e+06 for the preset data_aware, but got inf",
    ),
    "no smoke": ("output: a", ["smoke=true"], "'smoke': expected false, as this recipe has no smoke_overrides"),
    "not an override": ("output: a", ["fast"], "'fast': expected key=value"),
    "not YAML": ("output: [a", [], "not valid YAML"),
    "no such folder": (
        "output: a\nmodel: {base: no/such/folder, aligned: a/b}\ndata: {source: c/d}\n"
        "corrections: {mine: {preset: guard}}",
        [],
        "'model.base': no such file or folder, and not a Hub id: 'no/such/folder'",
    ),
    "no such data": (
        "output: a\nmodel: {base: a/b, aligned: a/b}\ndata: {source: my.jsonl}\ncorrections: {mine: {preset: guard}}",
        [],
        "'data.source': no such file: 'my.jsonl'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_recipe_gets_one_clear_line(case, tmp_path, capsys):
    text, overrides, message = BAD[case]
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert main([str(path), *overrides]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert message in printed.err
    assert not printed.out


def test_a_missing_file_gets_the_nearest_name(capsys):
    assert main(["recipes/quikstart.yaml"]) == 2
    assert "no such file; did you mean recipes/quickstart.yaml?" in capsys.readouterr().err


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
        assert any("csulora/attenuation" in record and "loss" in record for record in records if record["run"] == run)
    assert (folder / "drift.png").read_bytes().startswith(b"\x89PNG")
    return rows


@pytest.mark.parametrize("name", ["quickstart", "quickstart_lightning"])
def test_quickstart_at_a_small_size(tmp_path, capsys, name):
    overrides = [*SMALL, f"toy.cache_dir={tmp_path / 'cache'}", f"output={tmp_path / 'first'}"]
    assert main([f"recipes/{name}.yaml", *overrides]) == 0
    printed = capsys.readouterr().out
    assert "saved, guard" in printed
    assert "attack success" in printed
    rows = check_output(tmp_path / "first", ["csulora", "guard"])
    assert [row["strength"] for row in rows] == [None, None, 10.0, 10.0]
    assert [row["method"] for row in rows] == ["aligned", "raw", "csulora", "guard"]

    # The resolved recipe beside the results runs again, from the cached lab, to the same numbers.
    built = sorted((tmp_path / "cache").rglob("*.safetensors"))
    times = [path.stat().st_mtime_ns for path in built]
    assert main([str(tmp_path / "first/recipe.yaml"), f"output={tmp_path / 'second'}"]) == 0
    assert [path.stat().st_mtime_ns for path in built] == times
    assert json.loads((tmp_path / "second/results.json").read_text()) == rows
    resolved = yaml.safe_load((tmp_path / "first/recipe.yaml").read_text())
    assert resolved["toy"]["base_steps"] == 5


def test_a_language_that_is_used_up_says_so():
    with pytest.raises(RecipeError, match="no more new requests"):
        Language(seed=0).draw(40_000, ["copy"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"text": "a"}\n', "expected a column 'messages', but got ['text']"),
        ("{nonsense", "not jsonl that can be read as a table"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', "'data.eval_share': expected a share that leaves rows"),
    ],
)
def test_chat_data_of_another_form_is_refused(tmp_path, capsys, text, message):
    (tmp_path / "chat.jsonl").write_text(text)
    overrides = [f"data.source={tmp_path / 'chat.jsonl'}", f"output={tmp_path / 'out'}"]
    assert main(["recipes/llama32_1b_sft.yaml", *overrides]) == 2
    assert message in capsys.readouterr().err


def chat_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<bos>", "<eos>", "<pad>", "<unk>", "user", "assistant", ":", *"abcdefghijklmnopqrstuvwxy"]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.chat_template = "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + ' <eos> ' }}{% endfor %}"
    return fast


def chat_pair(folder: Path) -> list[str]:
    """Tiny models and chat data in a folder; the overrides that name them."""
    base = tiny_llama(max_position_embeddings=64)
    base.save_pretrained(folder / "base")
    align(base).save_pretrained(folder / "aligned")
    chat_tokenizer().save_pretrained(folder / "aligned")
    talk = [{"role": "user", "content": "a b c"}, {"role": "assistant", "content": "c b a"}]
    (folder / "chat.jsonl").write_text("\n".join(json.dumps({"messages": talk}) for _ in range(40)))
    return [
        f"model.base={folder / 'base'}",
        f"model.aligned={folder / 'aligned'}",
        "model.dtype=float32",
        f"data.source={folder / 'chat.jsonl'}",
        "data.max_length=32",
        "data.eval_share=0.2",
    ]


def test_end_tokens_are_learned_and_padding_is_not(tmp_path):
    overrides = chat_pair(tmp_path)
    tokenizer = chat_tokenizer()
    tokenizer.pad_token = None  # as Llama's: its end token then pads
    tokenizer.save_pretrained(tmp_path / "aligned")
    recipe = load_recipe("recipes/llama32_1b_sft.yaml", overrides)
    task = build_task(recipe)
    said = ["a", "a b c"]
    talks = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": text}] for text in said]
    (batch,) = batches(task, recipe, Dataset.from_dict({"messages": talks}))
    for row, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        assert torch.equal(labels, row.where(mask.bool(), -100))
        assert (labels == task.tokenizer.eos_token_id).sum() == 2
    assert (batch["attention_mask"].sum(1)).tolist() == [8, 10]


def test_quickstart_data_aware_at_a_small_size(tmp_path, capsys):
    overrides = [*SMALL, f"toy.cache_dir={tmp_path / 'cache'}", f"output={tmp_path / 'out'}"]
    assert main(["recipes/quickstart_data_aware.yaml", *overrides]) == 0
    printed = capsys.readouterr().out
    assert "saved, data_aware" in printed
    assert "64 prompts to be refused" in printed
    check_output(tmp_path / "out", ["guard", "data_aware"])
    texts = json.loads((tmp_path / "out/data_aware/checkpoint-4/csulora/texts.json").read_text())
    assert len(texts["probes"]) == 64
    assert not (tmp_path / "out/guard/checkpoint-4/csulora/texts.json").exists()


def test_a_real_pair_with_probes_from_a_file(tmp_path, capsys):
    file = tmp_path / "probes.csv"
    file.write_text("question\na b\nb c a\n")
    overrides = [
        *chat_pair(tmp_path),
        "training.max_steps=2",
        "training.save_steps=2",
        "training.bf16=false",
        "corrections.csulora.preset=data_aware",
        "corrections.csulora.strength=3",
        f"data.probes={file}",
        "data.probes_column=question",
        f"output={tmp_path / 'out'}",
    ]
    assert main(["recipes/llama32_1b_sft.yaml", *overrides]) == 0
    assert "2 prompts to be refused" in capsys.readouterr().out
    assert main(["recipes/llama32_1b_sft.yaml", *overrides, "data.probes_column=prompt"]) == 2
    assert "'data.probes_column': expected a column of" in capsys.readouterr().err


@pytest.mark.parametrize("trainer", ["huggingface", "lightning"])
def test_the_path_of_a_real_pair_runs_offline_on_a_tiny_one(tmp_path, trainer):
    overrides = [
        *chat_pair(tmp_path),
        "training.max_steps=4",
        "training.logging_steps=1",
        "training.eval_steps=2",
        "training.save_steps=2",
        "training.bf16=false",
        "corrections.csulora.rank=2",
        f"trainer={trainer}",
        f"output={tmp_path / 'out'}",
    ]
    assert main(["recipes/llama32_1b_sft.yaml", *overrides]) == 0
    rows = check_output(tmp_path / "out", ["csulora"])
    assert all(row["attack_success_rate"] is None for row in rows)
    aligned, raw, saved = (row["task_loss"] for row in rows)
    assert raw < saved < aligned  # the correction gives up a part of what was learned, here on random models
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "aligned").config.vocab_size == 32


def test_the_two_quickstarts_differ_in_nothing_but_the_trainer():
    one, other = (load_recipe(f"recipes/{name}.yaml", []) for name in ("quickstart", "quickstart_lightning"))
    assert dataclasses.replace(other, trainer=one.trainer, output=one.output) == one


def test_a_missing_lightning_names_the_extra(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "lightning", None)
    monkeypatch.delitem(sys.modules, "recipes.lightning", raising=False)
    assert main(["recipes/quickstart_lightning.yaml", f"output={tmp_path}"]) == 2
    assert "pip install -c constraints.txt -e '.[recipes,lightning]'" in capsys.readouterr().err


@pytest.mark.slow
def test_quickstart_at_full_size_gives_a_lab_that_shows_the_problem(tmp_path):
    """The lab does what its words say; what the corrections do to it is reported, not asserted."""
    overrides = [f"output={tmp_path / 'out'}", f"toy.cache_dir={tmp_path / 'cache'}"]
    assert main(["recipes/quickstart.yaml", *overrides]) == 0
    aligned, raw, *_ = check_output(tmp_path / "out", ["csulora", "guard"])
    assert aligned["attack_success_rate"] < 0.1
    assert raw["attack_success_rate"] > 0.5
    assert raw["task_accuracy"] > aligned["task_accuracy"] + 0.3
