"""Checkpoints are read lazily, the same whatever their storage, and bad ones are refused by name."""

import json
import logging
import re
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model

from csulora_callback import SafetySubspace
from csulora_callback.models.checkpoint import open_checkpoint
from csulora_callback.models.names import module_name
from tests.helpers.lab import TARGETS, align, tiny_llama, with_lora


def to_bin(folder: Path, target: Path) -> Path:
    """The same checkpoint as `pytorch_model.bin`."""
    target.mkdir()
    shutil.copy(folder / "config.json", target)
    torch.save(load_file(folder / "model.safetensors"), target / "pytorch_model.bin")
    return target


def to_bin_shards(folder: Path, target: Path) -> Path:
    """The same checkpoint as two `.bin` files and their index."""
    target.mkdir()
    shutil.copy(folder / "config.json", target)
    state, names = load_file(folder / "model.safetensors"), ("one.bin", "two.bin")
    weight_map = {key: names[place % 2] for place, key in enumerate(state)}
    for name in names:
        torch.save({key: state[key] for key in state if weight_map[key] == name}, target / name)
    (target / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return target


@pytest.fixture(scope="module")
def storages(tmp_path_factory):
    """One model in every storage."""
    folder, model = tmp_path_factory.mktemp("weights"), tiny_llama()
    model.save_pretrained(folder / "single")
    model.save_pretrained(folder / "sharded", max_shard_size="4KB")
    assert len(list((folder / "sharded").glob("*.safetensors"))) > 2
    return {
        "single": folder / "single",
        "sharded": folder / "sharded",
        "bin": to_bin(folder / "single", folder / "bin"),
        "sharded bin": to_bin_shards(folder / "single", folder / "sharded bin"),
        "memory": model,
        "peft": with_lora(tiny_llama()),
        "compiled": torch.compile(with_lora(tiny_llama())),
    }


@pytest.mark.parametrize("storage", ["single", "sharded", "bin", "sharded bin", "memory", "peft", "compiled"])
def test_every_storage_gives_the_same_weights_and_fingerprint(storages, storage):
    checkpoint, model = open_checkpoint(storages[storage]), tiny_llama()
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert set(linear) <= set(checkpoint.names())
    for name in linear:
        assert torch.equal(checkpoint.weight(name), model.get_submodule(name).weight)
        assert checkpoint.shape(name) == tuple(model.get_submodule(name).weight.shape)
    assert checkpoint.fingerprint(linear) == open_checkpoint(model).fingerprint(reversed(linear))


def test_fingerprint_changes_with_one_bit_of_one_weight(storages):
    name, model = "model.layers.1.mlp.down_proj", tiny_llama()
    before = open_checkpoint(model).fingerprint([name])
    with torch.no_grad():
        model.get_submodule(name).weight[0, 0] *= 1 + 2**-23
    assert open_checkpoint(model).fingerprint([name]) != before


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj"),
        ("base_model.model.model.layers.0.mlp.up_proj.base_layer", "model.layers.0.mlp.up_proj"),
        ("_orig_mod.base_model.model.lm_head", "lm_head"),
        ("module.base_model.model.transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_attn"),
        ("base_model.model.model.layers.0._orig_mod.self_attn.q_proj", "model.layers.0.self_attn.q_proj"),
        ("_fsdp_wrapped_module.base_model.model.lm_head", "lm_head"),
        ("_orig_mod.module.model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"),
        ("inner.base_model.model.lm_head", "lm_head"),
    ],
)
def test_module_name(raw, name):
    assert module_name(raw) == name


def test_estimating_holds_one_pair_of_tensors(storages, tmp_path, monkeypatch):
    """Every tensor read earlier is gone by the time the next pair is read."""
    align(tiny_llama()).save_pretrained(tmp_path / "aligned")
    alive, most = [], 0
    # The class that `estimate` itself uses: `--doctest-modules` may import a module a second time.
    used = SafetySubspace.estimate.__globals__["CheckpointPair"].open.__globals__["Checkpoint"]
    read = used.weight

    def counting(self, name):
        nonlocal most
        tensor = read(self, name)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(reference() is not None for reference in alive))
        return tensor

    monkeypatch.setattr(used, "weight", counting)
    subspace = SafetySubspace.estimate(storages["single"], tmp_path / "aligned", rank=2, progress=False)
    assert len(alive) == 2 * len(subspace)  # each read once
    assert most <= 4  # the pair of this module, and the one that is read ahead


def test_names_that_differ_on_disk_are_those_that_transformers_gives(tmp_path, caplog):
    config = GPT2Config(vocab_size=32, n_embd=8, n_layer=1, n_head=2, n_positions=16)
    torch.manual_seed(0)
    GPT2Model(config).save_pretrained(tmp_path / "headless")  # names have no "transformer." prefix
    saved = json.loads((tmp_path / "headless/config.json").read_text())
    saved["architectures"] = ["GPT2LMHeadModel"]
    (tmp_path / "headless/config.json").write_text(json.dumps(saved))
    torch.manual_seed(0)
    expected = GPT2LMHeadModel(config)
    name = "transformer.h.0.attn.c_attn"
    with caplog.at_level(logging.WARNING):
        checkpoint = open_checkpoint(tmp_path / "headless", [name])
    assert torch.equal(checkpoint.weight(name), expected.get_submodule(name).weight)
    assert "loaded through transformers" not in caplog.text
    with pytest.raises(ValueError, match=r"expected a weight for the module 'transformer\.h\.7.*nearest names"):
        open_checkpoint(tmp_path / "headless", ["transformer.h.7.attn.c_attn"])


def test_weights_that_transformers_would_make_up_are_missing(storages, tmp_path):
    """The files lack a weight: a random one must not pass for it, nor training's random numbers change."""
    folder, gone = shutil.copytree(storages["single"], tmp_path / "incomplete"), "model.layers.1.mlp.up_proj"
    state = load_file(folder / "model.safetensors")
    del state[f"{gone}.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=rf"expected a weight for the module '{re.escape(gone)}'"):
        open_checkpoint(folder, [gone])
    assert torch.equal(torch.get_rng_state(), before)


HUB_SCRIPT = """
from csulora_callback.models.checkpoint import open_checkpoint
for revision in (None, "other", "nowhere"):
    try:
        print(open_checkpoint("some-org/some-model", revision=revision).fingerprint(["lm_head"]))
    except FileNotFoundError as error:
        print(error)
"""


@pytest.mark.slow
def test_hub_ids_come_from_the_cache_with_their_revision_when_offline(storages, tmp_path):
    repo = tmp_path / "models--some-org--some-model"
    for commit, model in (("a" * 40, tiny_llama(0)), ("b" * 40, tiny_llama(9))):
        model.save_pretrained(repo / "snapshots" / commit)
    for ref, commit in (("main", "a" * 40), ("other", "b" * 40)):
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / ref).write_text(commit)
    environment = {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": ""}
    run = subprocess.run([sys.executable, "-c", HUB_SCRIPT], env=environment, capture_output=True, text=True)
    main, other, missing = run.stdout.splitlines()
    assert main == open_checkpoint(storages["single"]).fingerprint(["lm_head"])
    assert other == open_checkpoint(tiny_llama(9)).fingerprint(["lm_head"])
    assert "some-org/some-model: not a local folder, and the Hub did not give it" in missing
    assert "HF_HUB_OFFLINE" in missing


def test_bad_sources_are_refused(storages, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected one of model\.safetensors\.index\.json"):
        open_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="neither"):
        open_checkpoint("no/such/folder/anywhere")
    (tmp_path / "model.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00not a header")
    with pytest.raises(ValueError, match=r"model\.safetensors: expected a safetensors file, but it is corrupt"):
        open_checkpoint(tmp_path)
    sharded = shutil.copytree(storages["sharded"], tmp_path / "sharded")
    next(sharded.glob("*.safetensors")).unlink()
    with pytest.raises(FileNotFoundError, match=r"the shard .model-.*\.safetensors. that .* lists is missing"):
        open_checkpoint(sharded)
    (sharded / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ValueError, match="expected a shard index with a weight_map"):
        open_checkpoint(sharded)
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "pytorch_model.bin").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"expected tensors written by torch\.save"):
        open_checkpoint(tmp_path / "torn")
    with pytest.raises(ValueError, match=r"`revision`: expected None, since only a Hub id.* got 'main'"):
        open_checkpoint(storages["single"], revision="main")
    with pytest.raises(ValueError, match=r"module 'model\.layers\.0\.self_attn\.qproj'.*nearest names: .*q_proj"):
        open_checkpoint(storages["memory"], ["model.layers.0.self_attn.qproj"])


def test_bin_files_run_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save({"a.weight": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be read with weights_only=True"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, bad):
    weight = torch.ones(4, 4)
    weight[1, 2] = bad
    save_file({"layer.weight": weight}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="the weight of 'layer' holds NaN or Inf"):
        SafetySubspace.estimate(tmp_path, tmp_path, progress=False)


@pytest.mark.parametrize(
    "packed", [torch.zeros(8, 1, dtype=torch.uint8), torch.ones(4, 4).to(torch.float8_e4m3fn)], ids=["4 bit", "float8"]
)
def test_quantized_weights_are_refused_as_such(packed):
    """Also where they are packed into another shape than the base's."""
    base, quantized = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))
    quantized[0].weight = nn.Parameter(packed, requires_grad=False)
    with pytest.raises(ValueError, match=r"'0' is quantized \(torch\..*unquantized checkpoint"):
        SafetySubspace.estimate(base, quantized, progress=False)
    with pytest.raises(ValueError, match=r"'0' is quantized \(torch\..*unquantized checkpoint"):
        open_checkpoint(quantized).dtype("0")


def test_the_dtype_of_packed_weights_in_files_is_refused_though_they_are_floats(tmp_path):
    """As bitsandbytes stores them on demand; a subspace of float32 weights would else pass as not comparable."""
    save_file(
        {"0.weight": torch.ones(8, 1, dtype=torch.bfloat16), "0.weight.absmax": torch.ones(2)},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(ValueError, match=r"'0' is quantized \(packed, with absmax\).*unquantized checkpoint"):
        open_checkpoint(tmp_path).dtype("0")


def test_targets_reach_only_what_is_asked_for(storages):
    base = align(tiny_llama())
    by_suffix = SafetySubspace.estimate(storages["single"], base, TARGETS, rank=2, progress=False)
    by_regex = SafetySubspace.estimate(
        storages["single"], base, r".*\.(q_proj|v_proj|down_proj)", rank=2, progress=False
    )
    assert list(by_suffix) == list(by_regex)
    assert {name.rsplit(".", 1)[1] for name in by_suffix} == set(TARGETS)


def test_bin_files_from_before_zip_archives_are_read(tmp_path):
    weight = torch.randn(3, 4)
    torch.save({"layer.weight": weight}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(open_checkpoint(tmp_path).weight("layer"), weight)


def test_an_open_checkpoint_is_held_to_what_is_required_of_it(storages):
    opened = open_checkpoint(storages["single"])
    assert open_checkpoint(opened, ["lm_head"]) is opened
    with pytest.raises(ValueError, match="expected a weight for the module 'nothing'"):
        open_checkpoint(open_checkpoint(storages["memory"]), ["nothing"])
