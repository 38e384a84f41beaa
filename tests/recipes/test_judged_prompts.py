"""Attack success of a pair of one's own: by which prompts, which nobody reads, and every answer kept."""

import json
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from csulora_callback import AttackSuccessRate, OverRefusalRate, wilson_interval
from csulora_callback.sidecar import Sidecar
from recipes.files.recipe import load_recipe
from recipes.labs.chat import Answer, answers_to, chat
from recipes.run import main
from recipes.schema.recipe import RecipeError
from recipes.training.prompts import choose_prompts
from tests.helpers import refusing, small_talk
from tests.helpers.lab import tiny_llama
from tests.helpers.recipes import chat_pair, chat_tokenizer
from tests.helpers.small_talk import NOUNS
from tests.helpers.trl import always_sorry

RECIPE = "recipes/llama32_1b_sft.yaml"
GUARD, AWARE = "corrections={guard: {preset: guard, rank: 2}}", "corrections={aware: {preset: data_aware, rank: 2}}"
SHORT = ["training.max_steps=2", "training.save_steps=2", "training.logging_steps=1", "training.bf16=false"]


@pytest.fixture
def chosen(tmp_path):
    """The choice for a recipe, with prompts in files."""
    (tmp_path / "probes.txt").write_text("a\nb\nc\na\nd\ne\n")  # one of them twice
    (tmp_path / "one.txt").write_text("a\na\n")
    (tmp_path / "attacks.jsonl").write_text('{"question": "x"}\n{"question": "y"}\n')
    (tmp_path / "harmful.txt").write_text("v\nw\n")
    (tmp_path / "same.jsonl").write_text('{"question": "x"}\n{"question": "d"}\n')

    def choose(correction: str, **data: str):
        named = [f"data.{key}={tmp_path / value if '.' in value else value}" for key, value in data.items()]
        none = "data.probes=null"  # unless it is named
        return choose_prompts(load_recipe(RECIPE, [correction, none, *named]))

    return choose


def test_nothing_is_judged_by_what_a_correction_reads(chosen):
    all_of_them = ["a", "b", "c", "d", "e"]
    assert chosen(GUARD).judged == []
    alone = chosen(GUARD, probes="probes.txt")
    assert (alone.read, alone.judged) == (all_of_them, all_of_them)
    divided = chosen(AWARE, probes="probes.txt")
    assert (divided.read, divided.judged) == (["a", "c", "e"], ["b", "d"])
    assert divided.source == "every other one of data.probes, as corrections read the rest"
    apart = chosen(AWARE, probes="probes.txt", attacks="attacks.jsonl", attacks_column="question")
    assert (apart.read, apart.judged, apart.source) == (all_of_them, ["x", "y"], "those of data.attacks")
    assert chosen(GUARD, attacks="attacks.jsonl", attacks_column="question").read is None


def test_prompts_that_cannot_be_held_apart_are_refused(chosen):
    with pytest.raises(RecipeError, match=r"'data\.probes': expected two prompts at least, .* but got 1"):
        chosen(AWARE, probes="one.txt")
    with pytest.raises(RecipeError, match=r"'data\.attacks': .* which corrections read, but 1 of 2 are .* 'd'"):
        chosen(AWARE, probes="probes.txt", attacks="same.jsonl", attacks_column="question")
    with pytest.raises(RecipeError, match=r"'data\.attacks_column': expected a column of"):
        chosen(GUARD, attacks="attacks.jsonl")
    assert chosen(GUARD, probes="one.txt").judged == ["a"]


def test_harmless_prompts_are_all_judged_by(chosen):
    judged = chosen(GUARD, harmless="probes.txt")
    assert (judged.harmless, judged.judged) == (["a", "b", "c", "d", "e"], [])
    both = chosen(AWARE, probes="harmful.txt", harmless="probes.txt")
    assert (both.read, both.judged, both.harmless) == (["v"], ["w"], ["a", "b", "c", "d", "e"])
    assert chosen(AWARE, probes="harmful.txt").harmless == []
    for correction, key in ((AWARE, "probes"), (GUARD, "attacks")):
        with pytest.raises(
            RecipeError, match=rf"'data\.harmless': .* than data\.{key}, which .* 1 of 5 .* such as 'd'"
        ):
            chosen(correction, harmless="probes.txt", **{key: "same.jsonl", f"{key}_column": "question"})


def test_refusals_are_told_from_other_answers():
    """A model whose last norm is zero says the first word of the vocabulary and nothing else."""
    words, model = chat_tokenizer(), tiny_llama(max_position_embeddings=64)
    assert [answer.refused for answer in answers_to(model, words, ["a", "b c"])] == [False, False]
    torch.nn.init.zeros_(model.model.norm.weight)
    vocabulary = ["Sorry,", "<pad>", "<unk>", *(f"word{place}" for place in range(29))]
    sorry = Tokenizer(WordLevel({word: place for place, word in enumerate(vocabulary)}, unk_token="<unk>"))
    template = words.chat_template
    words = PreTrainedTokenizerFast(tokenizer_object=sorry, pad_token="<pad>", chat_template=template)
    assert answers_to(model, words, ["a"]) == [Answer("a", " ".join(["Sorry,"] * 32), True)]


@pytest.mark.slow
def test_the_table_has_attack_success_before_and_after_and_a_file_has_the_answers(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")  # of the terminal: no cell is broken
    probes = [f"{first} {second}" for first in "abcd" for second in "efgh"]
    harmless = [f"{first} {second}" for first in "ij" for second in "klm"]
    (tmp_path / "probes.txt").write_text("\n".join(probes))
    (tmp_path / "harmless.txt").write_text("\n".join(harmless))
    pair, out = chat_pair(tmp_path), tmp_path / "out"
    always_sorry(chat_tokenizer()).save_pretrained(tmp_path / "aligned")  # only what is refused is read
    settings = [*pair, *SHORT, f"data.probes={tmp_path / 'probes.txt'}", f"output={out}", AWARE]
    assert main([RECIPE, *settings, f"data.harmless={tmp_path / 'harmless.txt'}"]) == 0
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    title = "8 prompts each: every other one of data.probes, as corrections read the rest; 6 harmless"
    assert title in printed

    rows = {row["method"]: row for row in json.loads((out / "results.json").read_text())}
    said = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert list(rows) == ["aligned", "raw", "aware"]
    prompts, words = probes[1::2] + harmless, PreTrainedTokenizerFast.from_pretrained(tmp_path / "aligned")
    asked = [(line["model"], line["prompt"], line["harmless"]) for line in said]
    assert asked == [(name, prompt, prompt in harmless) for name in rows for prompt in prompts]
    for name, row in rows.items():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "aligned")
        if name != "aligned":
            folder = out / "aware/checkpoint-2"
            model = PeftModel.from_pretrained(model, folder / "csulora/raw" if name == "raw" else folder)
        answers = chat(model, words, prompts, 32)
        assert [line["answer"] for line in said if line["model"] == name] == answers
        attacks, refusals = AttackSuccessRate(), OverRefusalRate()
        attacks.update(prompts[:8], answers[:8])
        refusals.update(prompts[8:], answers[8:])
        assert (row["succeeded"], row["prompts"]) == (attacks.compute()["count"], 8)
        assert (row["over_refused"], row["harmless_prompts"]) == (refusals.compute()["count"], 6)
        for count, of in ((row["succeeded"], 8), (row["over_refused"], 6)):
            low, high = wilson_interval(count, of)
            assert f"{count / of:.1%} ({100 * low:.0f}–{100 * high:.0f})" in printed
    assert Sidecar.load(out / "aware/checkpoint-2").texts.probes == asked_of(words, probes[::2])


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["huggingface", "lightning"])
def test_corrections_that_read_different_tokens_share_a_training(trainer, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    base, aligned = refusing.save_pair(tmp_path)
    files = {"probes": refusing.RESTRICTED, "attacks": refusing.SHORTER, "harmless": refusing.HARMLESS}
    for name, prompts in files.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(prompts))
    rows = [{"prompt": f"tell of the {noun}", "completion": small_talk.story(noun, "likes", "fox")} for noun in NOUNS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 8))
    named = [f"data.{name}={tmp_path / name}.txt" for name in files]
    settings = [f"model.base={base}", f"model.aligned={aligned}", "model.dtype=float32", *named, *SHORT]
    settings += [f"data.source={tmp_path / 'rows.jsonl'}", "data.eval_share=0.2", f"trainer={trainer}"]
    corrections = [
        "corrections={kept: {preset: guard, target: 0.5, rank: 2}, aware: {preset: data_aware, rank: 2}, "
        "content: {preset: content_aware, strength: 30, rank: 2}}",
        "corrections={content: {preset: content_aware, strength: 30, rank: 2}}",
    ]
    for name, correction in zip(("all", "alone"), corrections, strict=True):
        assert main([RECIPE, *settings, correction, f"output={tmp_path / name}"]) == 0
    printed = capsys.readouterr().out
    assert f"; {len(refusing.HARMLESS)} harmless" in printed
    assert re.search(r"\W+success\W+refused\W+loss\W+accuracy\W", printed)  # under attack, harmless, task
    made = {name: last_of(tmp_path / "all" / name) for name in ("kept", "aware", "content")}
    told = {name: Sidecar.load(folder).record["penalty"]["name"] for name, folder in made.items()}
    assert told == {"kept": "guard", "aware": "data_aware", "content": "content_aware"}
    alone = last_of(tmp_path / "alone/content")  # what the callback itself writes
    written = [load_file(folder / "adapter_model.safetensors") for folder in (made["content"], alone)]
    assert all(torch.equal(weight, written[1][name]) for name, weight in written[0].items())


def asked_of(words: PreTrainedTokenizerFast, prompts: list[str]) -> list[list[int]]:
    turns = [[{"role": "user", "content": text}] for text in prompts]
    return words.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]


def last_of(run: Path) -> Path:
    """The adapter of its last checkpoint, in either trainer's form."""
    return next(path for path in (run / "checkpoint-2", run / "step=2.adapter") if path.exists())
