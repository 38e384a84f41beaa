"""The command that corrects, where the model reads or answers texts for it."""

import json

import pytest

from csulora_callback import Penalty, correct_adapter
from csulora_callback.card_section import strength_in_words
from tests.helpers.command_line import run
from tests.helpers.lab import assert_same, saved


@pytest.mark.parametrize("make", [Penalty.data_aware, Penalty.content_aware])
def test_a_data_aware_correction_has_the_model_read_what_is_given(make, lab, subspace, tmp_path):
    files = {}
    expected = {"probes": [[0, 5, 6, 7], [0, 9, 8]], "task": [[3, 4, 5], [6, 7, 8, 9]]}
    for name, rows in expected.items():
        files[name] = tmp_path / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps({"input_ids": row, "prompt": row}) + "\n" for row in rows))
    rule = ("--subspace", lab / "subspace.safetensors", "--penalty", make.__name__, "--strength", "4")
    texts = [part for name, file in files.items() for part in (f"--{name}", file)]
    status, output, error = run("correct", lab / "raw", "-o", tmp_path / "made", *rule, *texts, "--json")
    assert status == 0, error
    assert json.loads(output)["penalty"] == make(4.0).to_json()
    correct_adapter(lab / "raw", subspace, tmp_path / "expected", make(4.0), **expected)
    assert_same(saved(tmp_path / "made"), saved(tmp_path / "expected"))
    status, output, error = run("correct", lab / "raw", "-o", tmp_path / "other", *rule)
    assert (status, output) == (1, "")
    assert "`--probes`: expected prompts that are to be refused" in error
    rule = ("--subspace", lab / "subspace.safetensors", "--penalty", "guard", "--strength", "4")
    status, output, error = run("correct", lab / "raw", "-o", tmp_path / "other", *rule, "--probes", "builtin")
    assert (status, output) == (2, "")
    assert "`--probes`, `--task`: only for a data-aware penalty, or a --target." in error


def test_a_target_takes_the_place_of_a_strength(lab, subspace, tmp_path):
    prompts = [[0, 3 + i, 4 + 2 * i % 20] for i in range(16)]
    probes, rule = tmp_path / "probes.jsonl", ("--subspace", lab / "subspace.safetensors")
    probes.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    rule = (*rule, "--probes", probes, "--target", 0.995)
    status, output, error = run("correct", lab / "raw", "-o", tmp_path / "a", *rule)
    assert status == 0, error
    expected = correct_adapter(lab / "raw", subspace, tmp_path / "b", Penalty.data_aware, probes=prompts, target=0.995)
    assert_same(saved(tmp_path / "a"), saved(tmp_path / "b"))
    assert strength_in_words(expected.record["target"]) in output
    answer = json.loads(run("correct", lab / "raw", *rule, "--penalty", "guard", "--dry-run", "--json")[1])
    assert answer["penalty"]["name"] == "guard"
    assert answer["target"].keys() == {"share", "likelihood", "prompts"}
    assert answer["target"]["prompts"] == 16
