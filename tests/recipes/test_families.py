"""``python -m recipes.families``: what it says of a family is what a dense reference says of what was really saved."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel
from transformers.models.jamba.modeling_jamba import JambaAttentionDecoderLayer, JambaMambaDecoderLayer
from typer.testing import CliRunner

from recipes.families.__main__ import app
from recipes.families.catalogue import ALL_LINEAR, PEFT_DEFAULT, Entry, catalogue
from recipes.families.isolated import Died, call
from recipes.families.pair import make_pair
from recipes.families.reference import check
from recipes.families.report import count_rows, to_markdown
from recipes.families.tiny import tiny_config
from recipes.families.trial import (
    CORRECTED,
    LOST,
    NOT_ADAPTED,
    NOT_BUILT,
    OUTCOMES,
    REFUSED,
    STEPS,
    lora,
    train,
    usable_batch,
)
from recipes.files.markdown import markdown_table
from tests.helpers import jobs

KEPT = Path("recipes/results/families")


def kept() -> dict:
    return json.loads((KEPT / "results.json").read_text(encoding="utf-8"))


def test_the_page_that_is_kept_says_what_the_results_say():
    assert to_markdown(kept()) == (KEPT / "report.md").read_text(encoding="utf-8")
    text = Path("csulora_callback/README.md").read_text(encoding="utf-8")
    columns = ("what is trained", "tried", *OUTCOMES)
    assert f"<!-- families -->\n{markdown_table(columns, count_rows(kept()['points']))}\n" in text


def test_the_results_that_are_kept_are_of_all_families_and_none_is_wrong():
    results = kept()
    points = {(p["family"], p["task"], p["kind"], p["adapter"]): p["outcome"] for p in results["points"]}
    assert len(points) == len(results["points"])
    assert set(points.values()) <= {CORRECTED, LOST, REFUSED, NOT_ADAPTED, NOT_BUILT}
    if results["versions"]["transformers"] == version("transformers"):
        assert set(points) == {(e.family, e.task, e.kind, e.adapter) for e in catalogue()}


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2", "t5", "vit", "whisper", "llava", "jamba"])
def test_configs_are_tiny_and_have_each_kind_of_layer(family):
    config = tiny_config(family)
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) < 1e6
    if family == "jamba":
        assert {type(layer) for layer in model.layers} == {JambaMambaDecoderLayer, JambaAttentionDecoderLayer}


def test_an_option_that_is_unknown_is_one_line():
    for option, given in (("--family", "lama"), ("--adapter", "lora")):
        done = CliRunner().invoke(app, [option, given])
        assert done.exit_code == 2
        assert f"`{option}`: expected one of" in done.stderr
        assert f"but got '{given}'" in done.stderr
        assert done.stderr.count("\n") == 1


def test_a_process_of_its_own_answers_or_its_end_is_told(capfd):
    preload = jobs.__name__
    assert call(jobs.answers, 4, 60, preload) == {"twice": 8}
    for function, stage, message, seconds in (
        (jobs.hangs, "second", r"no answer within 0\.5 s", 0.5),
        (jobs.dies, "third", "the process ended with status 7", 60),
        (jobs.fails, "", r"KeyError in jobs\.py:\d+: 7", 60),
    ):
        with pytest.raises(Died, match=message) as raised:
            call(function, 7, seconds, preload)
        assert raised.value.stage == stage
    assert "not to be seen" not in capfd.readouterr().out


FAMILIES = ["llama", "mixtral", "gpt2", "t5", "vit", "falcon_mamba", "laguna", "blt"]


@pytest.mark.slow
def test_some_families_from_end_to_end(tmp_path):
    options = [word for family in FAMILIES for word in ("--family", family)] + ["--output", str(tmp_path)]
    command = [sys.executable, "-m", "recipes.families", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "LlamaForCausalLM" in done.stdout
    points = json.loads((tmp_path / "results.json").read_text())["points"]
    outcomes = {(p["family"], p["task"], p["adapter"]): p["outcome"] for p in points}
    for family, task in (("llama", "causal"), ("gpt2", "causal"), ("t5", "seq2seq"), ("vit", "image classes")):
        assert outcomes[family, task, ALL_LINEAR] == CORRECTED, family
    assert outcomes["llama", "causal", PEFT_DEFAULT] == CORRECTED
    assert outcomes["falcon_mamba", "causal", ALL_LINEAR] == NOT_ADAPTED
    assert outcomes["laguna", "causal", ALL_LINEAR] == LOST
    assert outcomes["blt", "causal", ALL_LINEAR] == NOT_BUILT
    for point in points:
        if point["outcome"] == CORRECTED:
            assert point["worst"] < 1e-5, point
            assert point["matrices"] >= 2, point
        else:
            assert point["said"] or point["lost"], point
        if point["family"] in ("llama", "vit", "t5") and point["task"] != "text classes":
            assert not point["said"], point  # trained on a batch
    assert to_markdown(json.loads((tmp_path / "results.json").read_text())) == (tmp_path / "report.md").read_text()

    # What is there is not tried again, and what a killed run was writing is.
    lines = (tmp_path / "points.jsonl").read_text().splitlines()
    planted = {**json.loads(lines[0]), "said": "from before"}
    (tmp_path / "points.jsonl").write_text("\n".join([json.dumps(planted), *lines[1:-1], lines[-1][:20]]))
    subprocess.run(command, capture_output=True, check=True)
    again = json.loads((tmp_path / "results.json").read_text())["points"]
    assert again == [planted, *points[1:]]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_what_is_saved_wrong_is_found_to_be_wrong(tmp_path):
    entry = Entry("llama", "causal", "LlamaForCausalLM", ALL_LINEAR)
    pair = make_pair(entry, tmp_path)
    model = get_peft_model(pair.load(pair.aligned)[0], lora(entry))
    train(model, usable_batch(entry, model)[0], pair, tmp_path)
    folder = tmp_path / f"out/checkpoint-{STEPS}"
    raw = folder / "csulora/raw"
    assert check(pair, raw, folder).worst < 1e-5
    assert check(pair, raw, raw).worst > 0.1  # not corrected
    file, key = folder / "adapter_model.safetensors", "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"
    save_file({**(state := load_file(file)), key: 1.001 * state[key]}, file)
    found = check(pair, raw, folder)
    assert found.worst == pytest.approx(1e-3, rel=0.1)
    assert found.where == "model.layers.1.mlp.down_proj.weight"
    save_file({name: value for name, value in state.items() if name != key}, file)
    with pytest.raises(KeyError):
        check(pair, raw, folder)
