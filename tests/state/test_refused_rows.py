"""Which rows of a sample are asked and refused, against real generation; what is remembered; when a warning is due."""

import logging
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig

from csulora_callback import aligned_answers
from csulora_callback.aligned_answers import ANSWER, judge
from csulora_callback.models.activations import Texts
from csulora_callback.models.adapters import find_adapter
from csulora_callback.models.processes import Processes
from csulora_callback.models.training_batches import TrainedBatch
from csulora_callback.models.training_rows import TrainingRows
from csulora_callback.refused_rows import RefusedRows
from tests.helpers import small_talk
from tests.helpers.lab import tiny_llama, with_lora
from tests.helpers.refusing import HARMLESS, RESTRICTED, Answered, is_refused, save_aligned


@pytest.fixture(scope="module")
def aligned(tmp_path_factory):
    return save_aligned(tmp_path_factory.mktemp("aligned"))


@pytest.fixture
def rows(aligned):
    """What marks rows by the model, which has a LoRA on it that changes every answer."""
    model = with_lora(type(tiny_llama()).from_pretrained(aligned), init_lora_weights=False, lora_dropout=0.1)
    adapter = find_adapter(model.train())
    adapter.write({name: (A, 20 * B) for name, (A, B) in adapter.read().items()})
    return RefusedRows(adapter, small_talk.tokenizer(), Processes())


@pytest.fixture
def asked(monkeypatch):
    """The prompts of every time that a model is asked."""
    times, answer = [], aligned_answers.greedy_answers
    monkeypatch.setattr(aligned_answers, "greedy_answers", lambda *a: times.append(list(a[1])) or answer(*a))
    return times


def sampled(items: Answered) -> Texts:
    sample = TrainingRows()
    for item in items:
        given = {key: value[None] for key, value in item.items()}
        sample.offer(TrainedBatch(given["input_ids"], given, LlamaConfig()))
    return Texts(sample.rows, [], sample.seen, sample.starts)


def of_prompts(prompts: list[str]) -> Texts:
    words = small_talk.tokenizer()
    ids = [words(f"<bos> {prompt} ?").input_ids for prompt in prompts]
    return Texts([[*row, 5, 6] for row in ids], [], len(ids), [len(row) for row in ids])


def test_marked_is_what_the_aligned_model_refuses_when_it_generates(rows, aligned):
    texts = sampled(Answered())
    marked = rows.mark(texts)
    prompts = [row[:start] for row, start in zip(texts.task, texts.starts, strict=True)]
    refused = is_refused(aligned, prompts)
    assert marked.screened == list(range(32))
    assert marked.refused == [place for place, verdict in enumerate(refused) if verdict]
    assert 0 < len(marked.refused) < 16
    assert marked.counted[0] == [row for row, verdict in zip(texts.task, refused, strict=True) if not verdict]
    assert marked.task == texts.task  # the sample goes on from all of them
    said = judge(aligned_answers.greedy_answers(rows.adapter.model, prompts, ANSWER), rows.tokenizer)
    assert not any(answer.refuses for answer in said)  # what is trained refuses nothing


def test_a_prompt_with_images_is_not_asked_as_a_text(rows, asked):
    texts = of_prompts(RESTRICTED[:3])
    marked = rows.mark(replace(texts, inputs={0: {"pixel_values": torch.ones(1)}, 2: None}))
    assert (marked.screened, marked.refused) == ([1], [1])
    assert asked == [[tuple(texts.task[1][: texts.starts[1]])]]


def test_a_row_whose_prompt_is_not_known_is_not_asked(rows, asked):
    texts = of_prompts([RESTRICTED[0]] * 5)
    rows_there, prompt = texts.task, texts.starts[0]
    starts = [0, len(rows_there[1]), 1, prompt, prompt]  # no labels; cut before its answer; <bos>, masked; as it is
    marked = rows.mark(Texts(rows_there, [], 5, starts))
    assert (marked.screened, marked.refused) == ([3, 4], [3, 4])
    assert asked == [[tuple(rows_there[3][:prompt])]]  # once
    assert rows.mark(Texts(rows_there, [], 5)).screened == []
    long = of_prompts(["tell of the cat cat cat cat cat cat cat cat cat cat", "tell of the cat" + " cat" * 11])
    assert [len(row) - 2 for row in long.task] == [15, 17]  # of 32 places that the model has 16 are for an answer
    assert rows.mark(long).screened == [0]


def test_only_rows_that_are_new_in_the_sample_are_asked_also_after_a_resume(rows, asked):
    first, later = of_prompts([*RESTRICTED[:2], HARMLESS[0]]), of_prompts([RESTRICTED[0], RESTRICTED[2], HARMLESS[0]])
    at_checkpoint = rows.mark(first)
    whole = rows.mark(later)
    rows.mark(first)  # a row that was in the sample before and is again: forgotten, as a resumed run cannot know it
    new = [tuple(texts.task[1][: texts.starts[1]]) for texts in (later, first)]
    assert asked[1:] == [[prompt] for prompt in new]
    asked.clear()
    resumed = RefusedRows(rows.adapter, rows.tokenizer, rows.processes)
    resumed.resume(at_checkpoint)
    assert resumed.mark(later) == whole
    assert asked == [[new[0]]]
    asked.clear()
    older = RefusedRows(rows.adapter, rows.tokenizer, rows.processes)
    older.resume(first)  # of a checkpoint that knows nothing of it
    assert older.mark(first).refused == at_checkpoint.refused == [0, 1]
    assert len(asked[0]) == 3


@pytest.mark.parametrize(
    ("refused", "others", "warned"), [(1, 0, False), (2, 0, True), (2, 38, True), (2, 39, False), (3, 39, True)]
)
def test_many_are_a_warning_once(rows, caplog, refused, others, warned):
    prompts = [RESTRICTED[i] for i in range(refused)] + [HARMLESS[i % 3] for i in range(others)]
    with caplog.at_level(logging.WARNING):
        rows.mark(of_prompts(prompts))
        rows.mark(of_prompts(prompts))
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == warned
    if warned:
        assert said[0].startswith(f"{refused} of {refused + others} sampled rows of training data have a prompt that")
        assert "such as 'tell of the likes poison ?'" in said[0]
        assert f"csulora screen DATA --model {rows.adapter.config.base_model_name_or_path}" in said[0]
