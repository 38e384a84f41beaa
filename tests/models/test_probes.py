"""Probes are prompts that a model can be asked: others are refused by name, and no more are asked than are needed."""

import json
import logging

import numpy as np
import pytest
import torch
from tokenizers import Regex, normalizers

from csulora_callback.models.probes import PROBES, check_ids, read_prompts, tokenize
from csulora_callback.models.training_rows import LENGTH
from tests.helpers import trl as in_trl


def refusal(run, *arguments) -> str:
    with pytest.raises(ValueError, match=r"^`probes`: expected") as raised:
        run(*arguments)
    return str(raised.value)


LISTS = "expected a source, or a list of prompts or of lists of token ids, but got "
EACH = "expected a text or a list of token ids for each prompt, but got "
IDS = "expected token ids, which are whole numbers ≥ 0, but got "
WRONG = {
    "a number": (3, LISTS + "3. Pass a list of texts"),
    "a boolean": (True, LISTS + "True"),
    "bytes": (b"how", LISTS + "b'how'"),
    "a dictionary": ({"prompt": ["how"]}, LISTS + "{'prompt': ['how']}"),
    "a set": ({"how"}, LISTS + "{'how'}"),
    "a generator": ((x for x in ["how"]), LISTS + "<generator"),
    "a tensor": (torch.tensor([[5, 6]]), LISTS + "tensor([[5, 6]]). Pass its .tolist(), without padding"),
    "numbers": ([5, 6], EACH + "5 at index 0"),
    "booleans": ([True], EACH + "True at index 0"),
    "bytes in a list": ([b"how"], EACH + "b'how' at index 0"),
    "dictionaries": ([{"prompt": "how"}], EACH + "{'prompt': 'how'} at index 0"),
    "None": (["how", None], EACH + "None at index 1"),
    "tensors": ([[5], torch.tensor([5, 6])], EACH + "tensor([5, 6]) at index 1. Pass its .tolist(), without"),
    "arrays": ([np.array([5, 6])], EACH + "array([5, 6]) at index 0. Pass its .tolist()"),
    "numbers that are tensors": ([[torch.tensor(5)]], IDS + "tensor(5) in the list at index 0. Pass its .tolist()"),
    "fractions": ([[5], [5, 6.0]], IDS + "6.0 in the list at index 1"),
    "booleans as ids": ([[5, True]], IDS + "True in the list"),
    "negative ids": ([[5, -100]], IDS + "-100 in the list"),
    "texts as ids": ([["how", "do"]], IDS + "'how' in the list"),
    "nested too deep": ([[[5, 6]]], IDS + "[5, 6] in the list"),
    "conversations": ([[{"role": "user", "content": "how"}]], IDS + "{'content': 'how', 'role': 'user'}"),
    "texts and ids": (["how", [5, 6]], "expected either texts or lists of token ids, but got both"),
    "nothing": ([], "expected prompts that are to be refused, but got none"),
    "nothing but empty texts": (["", " \n"], "expected prompts that are to be refused, but got none"),
    "nothing but empty lists": ([[], []], "expected prompts that are to be refused, but got none"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_list_of_prompts(case):
    probes, message = WRONG[case]
    assert message in refusal(read_prompts, probes)


def test_ids_are_plain_numbers_whatever_list_they_came_in():
    prompts = read_prompts([range(3, 6), (np.int64(7), 8), [0]])
    assert prompts == [[3, 4, 5], [7, 8], [0]]
    assert json.loads(json.dumps(prompts)) == prompts


def test_empty_prompts_are_left_out_and_counted(tmp_path, caplog):
    assert read_prompts([" one ", "", "  ", "two"]) == ["one", "two"]
    assert read_prompts([[5], [], [6]]) == [[5], [6]]
    (tmp_path / "a.jsonl").write_text('{"prompt": "one"}\n{"prompt": null}\n{"prompt": ""}\n{"prompt": "two"}\n')
    assert read_prompts(tmp_path / "a.jsonl") == ["one", "two"]
    assert [record.getMessage() for record in caplog.records] == [
        "2 of 4 probes are empty, and left out.",
        "1 of 3 probes are empty, and left out.",
        "2 of 4 probes are empty, and left out.",
    ]


def test_repeated_prompts_are_left_out_and_counted(caplog):
    """What a correction is measured by would otherwise be what it read."""
    assert read_prompts(["one", "two", " one "]) == ["one", "two"]
    assert read_prompts([[5], [6], (5,), []]) == [[5], [6]]
    assert [record.getMessage() for record in caplog.records] == [
        "1 of 3 probes are repeated, and left out.",
        "1 of 4 probes are empty, and left out.",
        "1 of 4 probes are repeated, and left out.",
    ]


def test_a_misspelt_name_is_refused_before_the_hub_is_asked(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"^`probes`: no such file: 'built-in'; did you mean 'builtin'\?$"):
        read_prompts("built-in")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "builtin.txt").write_text("one\n")
    assert read_prompts("builtin.txt") == ["one"]


def test_columns_of_tables(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": [5, 6]}\n{"prompt": null}\n{"prompt": [7]}\n')
    assert read_prompts(tmp_path / "a.jsonl") == [[5, 6], [7]]
    (tmp_path / "b.jsonl").write_text('{"prompt": 1}\n{"prompt": 2}\n')
    assert EACH + "1 at index 0" in refusal(read_prompts, tmp_path / "b.jsonl")
    (tmp_path / "a.csv").write_text("prompt\n1\nNA\n")
    assert read_prompts(tmp_path / "a.csv") == ["1", "NA"]
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfone\n")
    assert read_prompts(tmp_path / "b.txt") == ["one"]


@pytest.mark.parametrize("name", ["", "x" * 5000, "torch:../secret.txt", "a\0b.csv"])
def test_names_that_are_no_source(name):
    with pytest.raises(ValueError, match=r"^`probes`: "):
        read_prompts(name)


# Tokens.


@pytest.fixture
def saved(tmp_path):
    """Saves a tokenizer of words, with a template; where to."""

    def save(template: str | None = None, normalizer=None) -> str:
        words = in_trl.words()
        words.chat_template = template
        if normalizer is not None:
            words.backend_tokenizer.normalizer = normalizer
        words.save_pretrained(tmp_path / "words")
        return str(tmp_path / "words")

    return save


def ids(text: str) -> list[int]:
    """Of ``word7`` it is 10, after three special tokens."""
    return [3 + int(word.removeprefix("word")) for word in text.split()]


ALIKE = ["word1 word2", "word3"]


def test_a_template_that_leaves_out_the_user_is_refused(saved):
    checkpoint = saved("<bos> {% for m in messages if m['role'] == 'system' %}{{ m['content'] }}{% endfor %}")
    for prompts in (ALIKE, ALIKE[:1], ["word3", "word3"]):
        text = refusal(tokenize, prompts, checkpoint)
        assert f"tokenizer of {checkpoint!r} tells apart, but it gives the same token ids for any: its chat" in text
    checkpoint = saved("{% if messages[0]['role'] == 'system' %}word1{% endif %}")
    assert "but it gives no token ids for any: its chat template leaves out" in refusal(tokenize, ALIKE, checkpoint)


def test_a_vocabulary_that_has_none_of_the_words_is_refused(saved):
    assert "its vocabulary leaves out what they say" in refusal(
        tokenize, ["how?", "why?"], saved(normalizer=normalizers.Replace(Regex("."), ""))
    )


def test_repeated_prompts_are_no_reason_to_refuse(saved):
    assert tokenize(["word3", "word3"], saved()) == [ids("word3")] * 2


def test_prompts_of_which_a_tokenizer_leaves_nothing_are_left_out(saved, caplog):
    checkpoint = saved(normalizer=normalizers.Replace(Regex("[^a-z0-9 ]"), ""))
    assert tokenize(["word1", "…?", "word2 !"], checkpoint) == [ids("word1"), ids("word2")]
    assert f"1 of 3 probes are empty to the tokenizer of {checkpoint}, and left out." in caplog.text
    assert "but it gives no token ids for any" in refusal(tokenize, ["?", "!"], checkpoint)


def test_a_template_that_fails_is_refused(saved):
    for template in ("{{ raise_exception('no system turn') }}", "{{ messages[1]['content'] + 1 }}", "{% if %}"):
        text = refusal(tokenize, ALIKE, saved(template))
        assert "takes as the user's first turn, but it fails on them (" in text
        assert "Pass the prompts as lists of token ids instead." in text


def test_no_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    for checkpoint in (str(tmp_path), str(tmp_path / "nowhere"), "x" * 5000):
        assert f"expected a tokenizer in {checkpoint!r}" in refusal(tokenize, ALIKE, checkpoint)
    for checkpoint in (None, ""):  # of a model that was not loaded
        text = refusal(tokenize, ALIKE, checkpoint)
        assert "expected token ids, as the model under the adapter came from no checkpoint" in text


def test_code_beside_a_tokenizer_is_not_run_and_nobody_is_asked(saved, tmp_path, monkeypatch):
    checkpoint = saved()
    file = tmp_path / "words/tokenizer_config.json"
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    file.write_text(json.dumps({**json.loads(file.read_text()), **own}))
    (tmp_path / "words/own.py").write_text("raise SystemExit('executed')")
    monkeypatch.setattr("builtins.input", lambda prompt: pytest.fail(f"asked: {prompt}"))
    text = refusal(tokenize, ALIKE, checkpoint)
    assert "without running code that lies beside it (ValueError: The repository" in text
    assert "contains custom code" in text


def test_of_many_prompts_a_fixed_sample_is_asked(saved, caplog):
    before = torch.get_rng_state()
    many = [[3 + index // 1000, index] for index in range(10_000)]
    sample = tokenize(many, None)
    assert len(sample) == PROBES == 256
    assert sample == sorted(sample)  # in the order that they came in
    assert sample == tokenize(many, None)
    assert len({row[0] for row in sample}) == 10  # from everywhere
    assert torch.equal(torch.get_rng_state(), before)
    assert "256 of 10000 probes are used" in caplog.text
    texts = [f"word{index % 20} word{index // 20}" for index in range(300)]
    assert tokenize(texts, saved()) == tokenize([ids(text) for text in texts], None)


def test_as_many_as_are_used_are_all_used(caplog):
    with caplog.at_level(logging.INFO):
        assert tokenize([[index] for index in range(PROBES)], None) == [[index] for index in range(PROBES)]
    assert not caplog.records


def test_of_a_long_prompt_the_beginning_is_read(saved, caplog):
    long = list(range(LENGTH + 88))
    assert tokenize([long, [5, 6]], None) == [long[:512], [5, 6]]
    assert "1 of 2 probes are longer than 512 tokens" in caplog.text
    one = " ".join(["word1"] * 600)
    assert tokenize([one], saved()) == [ids(one)[:512]]


def test_prompts_behind_a_longer_system_prompt_are_refused(saved):
    checkpoint = saved("{{ 'word0 ' * 600 }}{{ messages[0]['content'] }}")
    text = refusal(tokenize, ALIKE, checkpoint)
    assert "differ in their first 512 tokens, as no more is read, but all begin alike" in text


def test_ids_outside_the_vocabulary_are_refused():
    check_ids([[0, 31], []], 32)
    for row in ([5, 32], [-1]):
        text = refusal(check_ids, [[4], row], 32)
        assert f"expected token ids from 0 to 31, which the model's input embedding has, but got {row[-1]} in" in text
