"""Attack success of a pair of one's own: by which prompts, which nobody reads, and every answer kept."""

import json

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from csulora_callback import AttackSuccessRate, wilson_interval
from csulora_callback.sidecar import Sidecar
from recipes.files.recipe import load_recipe
from recipes.labs.chat import Answer, attacked, chat
from recipes.run import main
from recipes.schema import RecipeError
from recipes.training.prompts import choose_prompts
from tests.helpers.lab import tiny_llama
from tests.helpers.recipes import chat_pair, chat_tokenizer
from tests.helpers.trl import always_sorry

GUARD, AWARE = "corrections={guard: {preset: guard, rank: 2}}", "corrections={aware: {preset: data_aware, rank: 2}}"
SHORT = ["training.max_steps=2", "training.save_steps=2", "training.logging_steps=1", "training.bf16=false"]


@pytest.fixture
def chosen(tmp_path):
    """The choice for a recipe, with prompts in files."""
    (tmp_path / "probes.txt").write_text("a\nb\nc\na\nd\ne\n")  # one of them twice
    (tmp_path / "one.txt").write_text("a\na\n")
    (tmp_path / "attacks.jsonl").write_text('{"question": "x"}\n{"question": "y"}\n')
    (tmp_path / "same.jsonl").write_text('{"question": "x"}\n{"question": "d"}\n')

    def choose(correction: str, **data: str):
        named = [f"data.{key}={tmp_path / value if '.' in value else value}" for key, value in data.items()]
        none = "data.probes=null"  # unless it is named
        return choose_prompts(load_recipe("recipes/llama32_1b_sft.yaml", [correction, none, *named]))

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


def test_refusals_are_told_from_other_answers():
    """A model whose last norm is zero says the first word of the vocabulary and nothing else."""
    words, model = chat_tokenizer(), tiny_llama(max_position_embeddings=64)
    assert [answer.refused for answer in attacked(model, words, ["a", "b c"])] == [False, False]
    torch.nn.init.zeros_(model.model.norm.weight)
    vocabulary = ["Sorry,", "<pad>", "<unk>", *(f"word{place}" for place in range(29))]
    sorry = Tokenizer(WordLevel({word: place for place, word in enumerate(vocabulary)}, unk_token="<unk>"))
    template = words.chat_template
    words = PreTrainedTokenizerFast(tokenizer_object=sorry, pad_token="<pad>", chat_template=template)
    assert attacked(model, words, ["a"]) == [Answer("a", " ".join(["Sorry,"] * 32), True)]


@pytest.mark.slow
def test_the_table_has_attack_success_before_and_after_and_a_file_has_the_answers(tmp_path, capsys):
    probes = [f"{first} {second}" for first in "abcd" for second in "efgh"]
    (tmp_path / "probes.txt").write_text("\n".join(probes))
    pair, out = chat_pair(tmp_path), tmp_path / "out"
    always_sorry(chat_tokenizer()).save_pretrained(tmp_path / "aligned")  # only what is refused is read
    settings = [*pair, *SHORT, f"data.probes={tmp_path / 'probes.txt'}", f"output={out}", AWARE]
    assert main(["recipes/llama32_1b_sft.yaml", *settings]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "8 prompts each: every other one of data.probes, as corrections read the rest" in printed

    rows = {row["method"]: row for row in json.loads((out / "results.json").read_text())}
    said = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert list(rows) == ["aligned", "raw", "aware"]
    prompts, words = probes[1::2], PreTrainedTokenizerFast.from_pretrained(tmp_path / "aligned")
    assert [(line["model"], line["prompt"]) for line in said] == [(name, p) for name in rows for p in prompts]
    for name, row in rows.items():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "aligned")
        if name != "aligned":
            folder = out / "aware/checkpoint-2"
            model = PeftModel.from_pretrained(model, folder / "csulora/raw" if name == "raw" else folder)
        answers = chat(model, words, prompts, 32)
        assert [line["answer"] for line in said if line["model"] == name] == answers
        judged = AttackSuccessRate()
        judged.update(prompts, answers)
        assert (row["succeeded"], row["prompts"]) == (judged.compute()["count"], 8)
        low, high = wilson_interval(row["succeeded"], 8)
        assert f"{row['attack_success_rate']:.1%} ({100 * low:.0f}–{100 * high:.0f})" in printed
    read = Sidecar.load(out / "aware/checkpoint-2").texts.probes
    assert (
        read
        == words.apply_chat_template(
            [[{"role": "user", "content": text}] for text in probes[::2]],
            add_generation_prompt=True,
            return_dict=True,
        )["input_ids"]
    )
