"""Adapters of other forms, from other places, expanded, and given back raw."""

import subprocess
import sys

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import PeftModel
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from csulora_callback import Penalty, SafetyCorrector, SafetySubspace, correct_adapter, restore_adapter
from csulora_callback.models.adapters import find_adapter
from csulora_callback.sidecar import Sidecar
from tests.helpers import lightning as in_lightning
from tests.helpers.huggingface import callback, fresh_model, train
from tests.helpers.lab import PENALTY, align, assert_same, live, raw, saved, with_lora

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def plain(pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    fresh_model(pair, init_lora_weights=False).save_pretrained(folder)
    return folder


def dense(penalty: Penalty, A, B, U, V, s: float) -> torch.Tensor:
    """The closest safe update as a matrix, by its definition."""
    A, B, U, V = (tensor.double() for tensor in (A, B, U, V))
    P_U, P_V, delta = U @ U.T, V @ V.T, s * B @ A
    Q_U, Q_V = torch.eye(len(U)) - P_U, torch.eye(len(V)) - P_V
    blocks = {"aligned": (P_U, P_V), "output": (P_U, Q_V), "input": (Q_U, P_V), "off": (Q_U, Q_V)}
    parts = {name: left @ delta @ right for name, (left, right) in blocks.items()}
    gain = penalty.gain({name: (part.norm() / delta.norm()).item() ** 2 for name, part in parts.items()})
    return sum(gain[name] * part for name, part in parts.items())


LORA = {
    "plain": {},
    "rank-stabilized": {"use_rslora": True},
    "patterns": {"rank_pattern": {"layers.0.self_attn.v_proj": 1, "down_proj": 12}, "alpha_pattern": {"q_proj": 3}},
    "both": {"use_rslora": True, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"layers.1.self_attn.v_proj": 0.5}},
}


@pytest.mark.parametrize("penalty", [Penalty.csulora(5.0), Penalty.guard(3.0), Penalty.separable(2.0)], ids=str)
@pytest.mark.parametrize("case", LORA)
def test_an_expanded_adapter_is_the_closest_safe_update_whole(pair, subspace, tmp_path, case, penalty):
    model = fresh_model(pair, init_lora_weights=False, **LORA[case])
    model.save_pretrained(tmp_path / "trained")
    done = correct_adapter(tmp_path / "trained", subspace, tmp_path / "out", penalty, rank="expand")
    assert done.record["rank"] == "expand"
    assert done.metrics["csulora/truncation_error"] == 0.0
    expanded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pair[1]), tmp_path / "out")
    before, after = find_adapter(model).layers, find_adapter(expanded).layers
    assert before.keys() == after.keys()
    for name, layer in before.items():
        assert after[name].scaling == pytest.approx(layer.scaling, rel=1e-15)
        assert after[name].shape[1] <= 2 * layer.shape[1]
        A, B = layer.lora_A.detach(), layer.lora_B.detach()
        expected = dense(penalty, A, B, subspace[name].U, subspace[name].V, layer.scaling)
        found = after[name].scaling * after[name].lora_B.double() @ after[name].lora_A.double()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * expected.abs().max().item())
    assert_same(raw(tmp_path / "out"), saved(tmp_path / "trained"))
    # The raw adapter has the config that it was trained with, not the expanded one's.
    restored = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(pair[1]), restore_adapter(tmp_path / "out", tmp_path / "restored")
    )
    assert_same(live(restored), saved(tmp_path / "trained"))
    again = correct_adapter(tmp_path / "out", subspace, tmp_path / "again", penalty, rank="expand")
    assert again.from_raw
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "out" / WEIGHTS).read_bytes()


def test_merged_weights_of_an_expanded_adapter(pair, subspace, plain, tmp_path):
    correct_adapter(plain, subspace, tmp_path / "out", PENALTY, rank="expand")
    aligned = AutoModelForCausalLM.from_pretrained(pair[1]).double()
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pair[1]).double(), tmp_path / "out")
    merged = merged.merge_and_unload()
    for name, layer in find_adapter(fresh_model(pair, init_lora_weights=False)).layers.items():
        A, B = layer.lora_A.detach(), layer.lora_B.detach()
        update = dense(PENALTY, A, B, subspace[name].U, subspace[name].V, layer.scaling)
        found = merged.get_submodule(name).weight - aligned.get_submodule(name).weight
        torch.testing.assert_close(found, update, rtol=0, atol=1e-6 * update.abs().max().item())


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("rank", ["truncate", "expand"])
@pytest.mark.parametrize("targets", [["c_attn", "c_proj", "c_fc"], r".*attn\.c_proj"], ids=["all", "square"])
def test_conv1d_weights_are_stored_transposed(tmp_path, rank, targets):
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16}
    base = GPT2LMHeadModel(GPT2Config(**sizes))
    aligned = align(base)
    names = [name for name, _ in aligned.named_modules() if name.split(".")[-1] in ("c_attn", "c_proj", "c_fc")]
    subspace = SafetySubspace.estimate(base, aligned, names, rank=2, progress=False)
    model = with_lora(aligned, target_modules=targets, init_lora_weights=False, fan_in_fan_out=False)
    model.save_pretrained(tmp_path / "trained")
    correct_adapter(tmp_path / "trained", subspace, tmp_path / "out", Penalty.guard(3.0), rank=rank)
    for name, layer in find_adapter(model).layers.items():
        A, B = layer.lora_A.detach(), layer.lora_B.detach()
        expected = dense(Penalty.guard(3.0), A, B, subspace[name].V, subspace[name].U, layer.scaling)
        found = saved(tmp_path / "out")
        new_A, new_B = (found[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
        if rank == "expand":
            torch.testing.assert_close(layer.scaling * new_B @ new_A, expected, rtol=0, atol=1e-5)
        else:
            best = torch.linalg.svdvals(expected)[len(A) :].norm()
            assert (layer.scaling * new_B @ new_A - expected).norm() == pytest.approx(best.item(), abs=1e-5)
    if rank == "truncate":
        with SafetyCorrector(model, subspace, Penalty.guard(3.0)).corrected():
            assert_same(live(model), saved(tmp_path / "out"))


def test_the_raw_adapter_is_given_back(pair, subspace, tmp_path):
    train(pair, tmp_path / "plain", [])
    train(pair, tmp_path / "run", [callback(pair)])
    folder = tmp_path / "run/checkpoint-8"
    assert restore_adapter(folder, tmp_path / "raw") == tmp_path / "raw"
    assert {path.name for path in (tmp_path / "raw").iterdir()} == {WEIGHTS, "adapter_config.json", "README.md"}
    assert (tmp_path / "raw" / WEIGHTS).read_bytes() == (tmp_path / "plain/checkpoint-8" / WEIGHTS).read_bytes()
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pair[1]), tmp_path / "raw")
    assert_same(live(model), raw(folder))
    with pytest.raises(FileNotFoundError, match="`checkpoint`: expected an adapter that was corrected"):
        restore_adapter(tmp_path / "raw", tmp_path / "twice")
    assert not correct_adapter(tmp_path / "raw", subspace, tmp_path / "back", PENALTY).from_raw
    assert_same(saved(tmp_path / "back"), saved(folder))


def test_lightnings_checkpoints(pair, subspace, tmp_path):
    saves = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1)
    in_lightning.fit(pair, tmp_path, [callback(pair), saves])
    file = tmp_path / "step=4.ckpt"
    factors, raw_factors = in_lightning.factors_in(file)
    for place in (file, tmp_path / "step=4.adapter"):
        assert_same(saved(restore_adapter(place, tmp_path / f"raw of {place.name}")), raw_factors)
        done = correct_adapter(place, subspace, tmp_path / f"again {place.name}", PENALTY)
        assert done.from_raw
        assert_same(saved(done.output), factors)
    (tmp_path / "alone").mkdir()
    file.rename(tmp_path / "alone/a.ckpt")
    with pytest.raises(FileNotFoundError, match=r"`checkpoint`: .* but got the file .*alone/a\.ckpt"):
        restore_adapter(tmp_path / "alone/a.ckpt", tmp_path / "out")


def test_raw_factors_beside_shards(pair, subspace, plain, tmp_path):
    """FSDP's checkpoints hold no adapter in a file of its own, but the raw one in csulora/."""
    correct_adapter(plain, subspace, tmp_path / "corrected", PENALTY)
    sidecar = Sidecar.load(tmp_path / "corrected")
    (tmp_path / "corrected" / WEIGHTS).unlink()
    (tmp_path / "corrected/adapter_config.json").unlink()
    assert_same(saved(restore_adapter(tmp_path / "corrected", tmp_path / "raw")), saved(plain))
    again = correct_adapter(tmp_path / "corrected", subspace, tmp_path / "again", PENALTY)
    assert again.record["corrected_digest"] == sidecar.record["corrected_digest"]


HUB_SCRIPT = """
import sys
from csulora_callback import Penalty, correct_adapter, restore_adapter
for name in ("some-org/adapter", "some-org/adapter@old", "some-org/adapter@nowhere"):
    try:
        out = f"{sys.argv[1]}/{name.partition('@')[2] or 'main'}"
        print(correct_adapter(name, f"{sys.argv[1]}/s.safetensors", out, Penalty.csulora(5.0)).from_raw)
    except FileNotFoundError as error:
        print(error)
restore_adapter("some-org/adapter", f"{sys.argv[1]}/raw")
"""


@pytest.mark.slow
def test_hub_ids_come_from_the_cache_with_their_revision_when_offline(pair, subspace, plain, tmp_path):
    subspace.save(tmp_path / "s.safetensors")
    repo = tmp_path / "hub/models--some-org--adapter"
    correct_adapter(plain, subspace, repo / "snapshots" / ("a" * 40), Penalty.guard(9.0))
    fresh_model(pair, init_lora_weights=False, seed=5).save_pretrained(repo / "snapshots" / ("b" * 40))
    (repo / "refs").mkdir()
    for ref, commit in (("main", "a" * 40), ("old", "b" * 40)):
        (repo / "refs" / ref).write_text(commit)
    environment = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "PATH": ""}
    command = [sys.executable, "-c", HUB_SCRIPT, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    main, old, missing = done.stdout.splitlines()
    assert (main, old) == ("True", "False"), done.stderr
    assert (
        "`adapter`: some-org/adapter: not a local folder, and the Hub did not give it of revision 'nowhere'" in missing
    )
    correct_adapter(plain, subspace, tmp_path / "expected", Penalty.csulora(5.0))
    assert_same(saved(tmp_path / "main"), saved(tmp_path / "expected"))
    assert_same(saved(tmp_path / "raw"), saved(plain))
    assert_same(raw(tmp_path / "old"), saved(repo / "snapshots" / ("b" * 40)))
