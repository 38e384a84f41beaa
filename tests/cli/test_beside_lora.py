"""Commands on adapters that were saved with more than LoRA in them."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from csulora_callback import Penalty, SafetySubspace
from tests.helpers.beside import by_hand, key, saved, tables
from tests.helpers.command_line import run
from tests.helpers.lab import RANK, TARGETS, assert_same, saved_pair, with_lora

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def adapter_of(model, folder: Path, **lora) -> Path:
    """As a training would have left it."""
    model = with_lora(model, init_lora_weights=False, **lora)
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter) * parameter.std()
    model.save_pretrained(folder)
    return folder


def test_a_head_and_an_embedding_are_corrected_and_inspected(pair, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    wholes = ["lm_head", "embed_tokens"]
    raw = adapter_of(AutoModelForCausalLM.from_pretrained(pair[1]), tmp_path / "raw", modules_to_save=wholes)
    file, guard = tmp_path / "subspace.safetensors", ["--penalty", "guard", "--strength", "3"]
    SafetySubspace.estimate(*pair, [*TARGETS, *wholes], rank=RANK, progress=False).save(file)
    status, _, error = run("correct", raw, "-o", tmp_path / "safe", "--subspace", file, *guard)
    assert status == 0, error
    trained, written = saved(raw), saved(tmp_path / "safe")
    for name in ("lm_head", "model.embed_tokens"):
        expected = by_hand(name, trained[key(name)], pair, Penalty.guard(3.0))
        torch.testing.assert_close(written[key(name)].double(), expected, atol=2e-6, rtol=0)
    assert run("restore", tmp_path / "safe", "-o", tmp_path / "undone")[0] == 0
    assert_same(saved(tmp_path / "undone"), trained)

    status, shown, _ = run("inspect", tmp_path / "safe", "--subspace", file, "--json")
    assert status == 0
    record = json.loads((tmp_path / "safe/csulora/correction.json").read_text())["modules"]
    for state, inspection in json.loads(shown)["states"].items():
        assert set(inspection["modules"]) == set(record)
        for name in ("lm_head", "model.embed_tokens"):
            energy, shares = record[name]["drift"][state]["energy"], inspection["modules"][name]["shares"]
            assert shares == pytest.approx({block: e / sum(energy.values()) for block, e in energy.items()}, abs=1e-9)
    status, shown, error = run("inspect", tmp_path / "safe", "--base", pair[0], "--json")  # all of the displacement
    assert status == 0, error
    (base, aligned), found = map(tables, pair), json.loads(shown)["states"]["raw"]["modules"]
    for name in ("lm_head", "model.embed_tokens"):
        D, update = aligned[name] - base[name], trained[key(name)] - aligned[name]
        assert found[name]["undone"] == pytest.approx(-((update * D).sum() / D.square().sum()).item(), rel=1e-4)


def test_what_passes_is_named_and_said(tmp_path):
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2)  # with biases of its own
    torch.manual_seed(0)
    pair = saved_pair(tmp_path, Qwen2ForCausalLM(config))
    raw = adapter_of(AutoModelForCausalLM.from_pretrained(pair[1]), tmp_path / "raw", bias="all")
    file = tmp_path / "subspace.safetensors"
    SafetySubspace.estimate(*pair, TARGETS, rank=RANK, progress=False).save(file)
    command = ("correct", raw, "-o", tmp_path / "safe", "--subspace", file)
    status, _, error = run(*command)
    assert status == 1
    assert "bias='all' is not supported" in error
    assert "uncorrected=['model.layers.0.self_attn." in error
    assert not (tmp_path / "safe").exists()
    status, shown, error = run(*command, "--uncorrected", "bias", "--json")
    assert status == 0, error
    listed = json.loads(shown)["not_corrected"]
    assert set(listed.values()) == {"named in `uncorrected`"}
    assert len(listed) == 6  # of each layer's queries, keys and values
    written, trained = saved(tmp_path / "safe"), saved(raw)
    assert {k: bool(written[k].equal(trained[k])) for k in written} == {k: "lora_" not in k for k in written}
    status, _, error = run("correct", raw, "-o", tmp_path / "b", "--subspace", file, "--uncorrected", "bias,score")
    assert status == 1
    assert "'score' matches nothing" in error


def test_the_aligned_checkpoint_has_to_be_there(pair, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(pair[1])
    raw = adapter_of(model, tmp_path / "raw", modules_to_save=["lm_head"])
    config = json.loads((raw / "adapter_config.json").read_text())
    (raw / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    file = tmp_path / "subspace.safetensors"
    SafetySubspace.estimate(*pair, [*TARGETS, "lm_head"], rank=RANK, progress=False).save(file)
    status, _, error = run("correct", raw, "-o", tmp_path / "safe", "--subspace", file)
    assert status == 1
    assert "`--aligned`: expected the aligned checkpoint, as 'lm_head' was trained beside LoRA" in error
    status, _, error = run("correct", raw, "-o", tmp_path / "safe", "--subspace", file, "--aligned", pair[0])
    assert status == 1
    assert "expected one of the aligned model in use" in error
    assert run("correct", raw, "-o", tmp_path / "safe", "--subspace", file, "--aligned", pair[1])[0] == 0
