"""Which probes count, and where the aligned model's answers to them are kept."""

import json
import logging
import os

import pytest
import torch

from csulora_callback.aligned_answers import ANSWER
from csulora_callback.behaviour import BEGINNING
from csulora_callback.checked_probes import check_probes
from csulora_callback.models import teacher_forcing
from csulora_callback.models.adapters import find_adapter
from csulora_callback.models.probes import tokenize
from csulora_callback.target import fewest_probes
from tests.helpers import small_talk
from tests.helpers.lab import tiny_llama, with_lora
from tests.helpers.refusing import HARMLESS, RESTRICTED, save_aligned


@pytest.fixture(scope="module")
def aligned(tmp_path_factory):
    """A tiny chat model that refuses requests about poison and weapons, in a folder with its tokenizer."""
    return save_aligned(tmp_path_factory.mktemp("aligned"))


@pytest.fixture
def adapter(aligned):
    """A LoRA that changes every answer, on top of it."""
    model = type(tiny_llama()).from_pretrained(aligned)
    return find_adapter(with_lora(model, init_lora_weights=False).train())


def test_what_the_aligned_model_does_not_refuse_is_left_out_by_count_and_example(adapter, aligned, caplog):
    before = {name: tensor.clone() for name, tensor in adapter.model.state_dict().items()}
    checked = check_probes(adapter, [*HARMLESS, *RESTRICTED])
    assert checked.prompts == tokenize(RESTRICTED, aligned)
    words = small_talk.tokenizer()
    assert {words.decode(beginning) for beginning in checked.beginnings} == {"i cannot help with"}
    assert all(len(beginning) == BEGINNING for beginning in checked.beginnings)
    assert [prompt for prompt, _ in checked.left_out] == HARMLESS
    assert all(answer.startswith("sure the cat") for _, answer in checked.left_out)
    assert checked.is_checked
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("3 of 13 probes are not refused by the aligned model, and left out: 'tell of the cat' is")
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter.model.state_dict().items())
    assert adapter.model.training


def test_too_few_that_are_refused_are_an_error(adapter, monkeypatch):
    with pytest.raises(ValueError, match=r"^`probes`: expected at least 8 prompts") as raised:
        check_probes(adapter, [*HARMLESS, *RESTRICTED[:7]])
    assert "but got 7 of 10: 'tell of the cat' is answered by 'sure the cat sees a dog'" in str(raised.value)
    assert "Is the model under the adapter the aligned one" in str(raised.value)
    assert "Pass prompts that it refuses, such as probes='builtin', or" in str(raised.value)
    with pytest.raises(ValueError, match=r"got 7 of 7\. Pass more of them, or probes='builtin'\.$"):
        check_probes(adapter, RESTRICTED[:7])
    monkeypatch.setattr("csulora_callback.checked_probes.read_prompts", lambda _: [*HARMLESS, *RESTRICTED])
    with pytest.raises(ValueError, match=r"got 7 of 10.* Pass prompts that it refuses, or leave `probes` out"):
        check_probes(adapter, [*HARMLESS, *RESTRICTED[:7]])  # who passed the built-in ones is not told to pass them
    assert len(check_probes(adapter, [*HARMLESS, *RESTRICTED[:8]]).prompts) == 8
    with pytest.raises(ValueError, match=r"^`probes`: expected at least 16 prompts that .*, but got 8 of 11: "):
        check_probes(adapter, [*HARMLESS, *RESTRICTED[:8]], fewest=fewest_probes(reads=True))


def test_token_ids_are_taken_at_their_word(adapter, aligned):
    checked = check_probes(adapter, tokenize(HARMLESS, aligned))
    assert (len(checked.prompts), checked.left_out, checked.is_checked) == (3, [], False)


def asked(monkeypatch) -> list:
    """Every time that the model is asked."""
    times, answer = [], teacher_forcing.greedy_answers
    monkeypatch.setattr("csulora_callback.aligned_answers.greedy_answers", lambda *a: times.append(1) or answer(*a))
    return times


def test_answers_are_kept_by_weights_and_prompts(adapter, aligned, tmp_path, monkeypatch, caplog):
    times = asked(monkeypatch)
    first = check_probes(adapter, RESTRICTED, tmp_path)
    again = check_probes(adapter, RESTRICTED, tmp_path)
    assert (first.from_cache, again.from_cache, len(times)) == (False, True, 1)
    assert (again.prompts, again.beginnings) == (first.prompts, first.beginnings)
    adapter.write({name: (A, 2 * B) for name, (A, B) in adapter.read().items()})
    assert check_probes(adapter, RESTRICTED, tmp_path).from_cache  # what is trained is not what answers
    assert not check_probes(adapter, RESTRICTED[:9], tmp_path).from_cache
    adapter.model.get_base_model().model.norm.weight.data *= 1.001  # no adapted module's
    assert not check_probes(adapter, RESTRICTED, tmp_path).from_cache
    assert len(list(tmp_path.iterdir())) == len(times) == 3
    assert not caplog.records


@pytest.mark.parametrize("damage", ["cut", "changed", "renamed", "a folder", "another kind"])
def test_a_cache_that_cannot_be_used_costs_a_warning(adapter, tmp_path, monkeypatch, caplog, damage):
    good = check_probes(adapter, RESTRICTED, tmp_path)
    (file,) = tmp_path.iterdir()
    kept = json.loads(file.read_text())
    if damage == "cut":
        file.write_text(file.read_text()[:-20])
    elif damage == "changed":
        kept["value"][0][0] += 1
        file.write_text(json.dumps(kept))
    elif damage == "renamed":
        check_probes(adapter, RESTRICTED[:9], tmp_path)
        (other,) = set(tmp_path.iterdir()) - {file}
        os.replace(other, file)
    elif damage == "a folder":
        file.unlink()
        file.mkdir()
    else:
        file.write_text("[1]")
    times = asked(monkeypatch)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        again = check_probes(adapter, RESTRICTED, tmp_path)
    assert (again.beginnings, again.from_cache, len(times)) == (good.beginnings, False, 1)
    assert "cached answers to the probes are unusable, and the model is asked again" in caplog.text
    if damage != "a folder":
        assert check_probes(adapter, RESTRICTED, tmp_path).from_cache  # mended


def test_a_cache_that_cannot_be_written_costs_a_warning(adapter, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    assert len(check_probes(adapter, RESTRICTED, tmp_path / "file/cache").prompts) == 10
    assert "could not be kept in the cache" in caplog.text


def test_what_is_kept_is_the_whole_answer_that_was_judged(adapter, tmp_path):
    check_probes(adapter, RESTRICTED, tmp_path)
    (file,) = tmp_path.iterdir()
    answers = json.loads(file.read_text())["value"]
    assert {len(answer) for answer in answers} <= set(range(5, ANSWER + 1))
    assert small_talk.tokenizer().decode(answers[0], skip_special_tokens=True) == small_talk.REFUSAL


def test_a_model_with_an_encoder_is_refused_by_name():
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    adapter = find_adapter(with_lora(model, target_modules=["q"], task_type="SEQ_2_SEQ_LM"))
    with pytest.raises(ValueError, match=r"^`probes`: expected a decoder-only language model"):
        check_probes(adapter, [[5, 6]])
