"""A data-aware correction after training: the model reads again what the checkpoint kept, or what it is given."""

import json
import logging

import pytest

from csulora_callback import CSULoRACallback, Penalty, SafetySubspace, correct_adapter
from csulora_callback.models.task_rows import read_task
from csulora_callback.models.training_rows import ROWS
from csulora_callback.sidecar import Sidecar
from tests.helpers import trl as in_trl
from tests.helpers.huggingface import train
from tests.helpers.lab import RANK, TARGETS, align, assert_same, raw, saved, tiny_llama

PROBES = [[0, 5, 6, 7], [0, 9, 8], [0, 4, 11, 12, 13]]
PENALTY = Penalty.data_aware(4.0)


@pytest.fixture(scope="module")
def runs(pair, tmp_path_factory):
    """The same run without the callback, in ``plain``, and with it, in ``corrected``."""
    folder = tmp_path_factory.mktemp("runs")
    train(pair, folder / "plain", [])
    train(pair, folder / "corrected", [CSULoRACallback(pair[0], rank=RANK, penalty=PENALTY, probes=PROBES)])
    return folder


def test_what_the_checkpoint_kept_gives_the_callbacks_correction_again(runs, subspace, tmp_path):
    for step in (4, 8):
        folder = runs / f"corrected/checkpoint-{step}"
        done = correct_adapter(folder, subspace, tmp_path / str(step), PENALTY)
        assert done.from_raw
        assert_same(saved(tmp_path / str(step)), saved(folder))
        assert_same(raw(tmp_path / str(step)), raw(folder))
        assert Sidecar.load(tmp_path / str(step)).texts is None  # what is shipped holds no training data


def test_the_same_texts_given_from_outside_give_the_same(runs, subspace, tmp_path):
    texts = Sidecar.load(runs / "corrected/checkpoint-8").texts
    plain = runs / "plain/checkpoint-8"
    correct_adapter(plain, subspace, tmp_path / "a", PENALTY, probes=texts.probes, task=texts.task)
    assert_same(saved(tmp_path / "a"), saved(runs / "corrected/checkpoint-8"))
    (tmp_path / "task.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in texts.task))
    correct_adapter(plain, subspace, tmp_path / "b", PENALTY, probes=texts.probes, task=tmp_path / "task.jsonl")
    assert_same(saved(tmp_path / "b"), saved(runs / "corrected/checkpoint-8"))


def test_a_stronger_one_changes_more(runs, subspace, tmp_path):
    folder, changes = runs / "corrected/checkpoint-8", []
    for strength in (0.0, 4.0, 100.0):
        done = correct_adapter(folder, subspace, tmp_path / str(strength), Penalty.data_aware(strength))
        changes.append(done.metrics["csulora/relative_change"])
    assert changes[0] < 1e-12 < changes[1] < changes[2]
    assert_same(saved(tmp_path / "0.0"), raw(folder))


def test_probes_alone_do_but_a_warning_says_what_is_missing(runs, subspace, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        correct_adapter(runs / "plain/checkpoint-8", subspace, tmp_path / "out", PENALTY, probes=PROBES)
    assert "Nothing is known of the task" in caplog.text
    assert saved(tmp_path / "out").keys() == saved(runs / "corrected/checkpoint-8").keys()


def test_rows_are_a_bounded_fixed_sample(tmp_path):
    rows = [[place, *range(600)] for place in range(200)]
    sample = read_task(rows, None)
    assert sample == read_task(rows, None)
    assert (len(sample.rows), sample.seen, {len(row) for row in sample.rows}) == (ROWS, 200, {512})
    assert all(row[1:] == list(range(511)) for row in sample.rows)


def test_texts_and_conversations_go_through_the_tokenizer(tmp_path):
    words = in_trl.words()
    words.chat_template = "<bos> {% for message in messages %}{{ message['content'] }} {% endfor %}"
    words.save_pretrained(tmp_path)
    ids = words.convert_tokens_to_ids(["word1", "word2"])
    (tmp_path / "a.txt").write_text("word1 word2\n")
    assert read_task(tmp_path / "a.txt", str(tmp_path)).rows == [words("word1 word2").input_ids]
    turns = [{"role": "user", "content": "word1"}, {"role": "assistant", "content": "word2"}]
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": turns}))
    assert read_task(tmp_path / "b.jsonl", str(tmp_path)).rows == [[0, *ids]]


BAD = {
    "no probes": ({}, "`probes`: expected prompts that are to be refused, as the penalty is data-aware"),
    "no rows": ({"probes": PROBES, "task": []}, "`task`: expected a source of rows"),
    "texts": ({"probes": PROBES, "task": ["a"]}, "`task`: expected rows of token ids"),
    "negative": ({"probes": PROBES, "task": [[-1]]}, "`task`: expected rows of token ids"),
    "a token too many": ({"probes": PROBES, "task": [[32]]}, "`task`: expected token ids from 0 to 31"),
    "another": ({"probes": [[32]]}, "`probes`: expected token ids from 0 to 31"),
    "no model": (
        {"probes": PROBES, "aligned_model": "no/such/folder"},
        "`aligned_model`: expected the model under the",
    ),
    "no file": ({"probes": PROBES, "task": "a.jsonl"}, "`task`: no such file"),
    "probes for nothing": ({"penalty": Penalty.guard(1.0), "probes": PROBES}, "`probes`: expected none, as only"),
    "task for nothing": ({"penalty": Penalty.guard(1.0), "task": PROBES}, "`task`: expected none, as only"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_read_is_refused(runs, subspace, tmp_path, case):
    arguments, message = BAD[case]
    with pytest.raises(ValueError, match=f"^{message}"):
        correct_adapter(runs / "plain/checkpoint-8", subspace, tmp_path / "out", **{"penalty": PENALTY, **arguments})
    assert not (tmp_path / "out").exists()


def test_a_subspace_of_another_model_is_refused_where_the_model_is_at_hand(runs, pair, tmp_path):
    other = tiny_llama(9)
    subspace = SafetySubspace.estimate(other, align(other), TARGETS, rank=RANK, progress=False)
    folder = runs / "corrected/checkpoint-8"
    with pytest.raises(ValueError, match="`subspace`: expected one of the aligned model in use"):
        correct_adapter(folder, subspace, tmp_path / "out", PENALTY)
    with pytest.raises(ValueError, match="`subspace`: expected one of the aligned model in use"):
        correct_adapter(folder, subspace, tmp_path / "out", Penalty.guard(1.0), aligned_model=pair[1])
    assert not (tmp_path / "out").exists()
    correct_adapter(folder, subspace, tmp_path / "out", Penalty.guard(1.0))  # which nothing tells from the files
