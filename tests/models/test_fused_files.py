"""Each expert out of files is what transformers loads, of its own tensors alone, whatever the files look like."""

import json
import logging
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import MixtralForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import MergeModulelist, WeightConverter

from csulora_callback import SafetySubspace
from csulora_callback.models import checkpoint as checkpoints
from csulora_callback.models import weight_files
from csulora_callback.models.checkpoint import open_checkpoint
from csulora_callback.models.fused_experts import join_experts, split_experts
from csulora_callback.models.layout import Layout
from tests.helpers.experts import FAMILIES, experts_pair, load, weights

WEIGHTS = "model.safetensors"
UP, DOWN = "model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"
W2 = "model.layers.1.block_sparse_moe.experts.3.w2.weight"


def experts_of(folder: Path) -> dict[str, torch.Tensor]:
    """By the library's name, each expert of what transformers loads."""
    return {
        f"{name}[{number}]": expert
        for name, weight in load(folder).state_dict().items()
        if weight.ndim == 3
        for number, expert in enumerate(weight)
    }


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    made = {}

    def of(name: str) -> tuple[Path, Path]:
        if name not in made:
            made[name] = experts_pair(tmp_path_factory.mktemp("pair"), name)
        return made[name]

    return of


def never(*_):
    raise AssertionError("the model was loaded")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_expert_is_what_transformers_loads_and_no_model_is(pairs, name, monkeypatch):
    wanted = experts_of(pairs(name)[0])
    monkeypatch.setattr(checkpoints, "load_through_transformers", never)
    found = open_checkpoint(pairs(name)[0], wanted)
    for expert, weight in wanted.items():
        assert found.shape(expert) == tuple(weight.shape)
        assert torch.equal(found.weight(expert), weight), expert
    everything = open_checkpoint(pairs(name)[0]).with_all_experts().names()
    assert wanted.keys() <= set(everything)
    assert not any(".experts.0." in other or ".experts.10." in other for other in everything)  # what they are made of


def test_experts_are_told_through_the_class_in_training_and_in_a_bigger_module(pairs, monkeypatch):
    base, aligned = pairs("mixtral")
    monkeypatch.setattr(checkpoints, "load_through_transformers", never)
    wanted = experts_of(base)
    for module, prefix in ((torch.nn.ModuleDict({"lm": load(aligned)}), "lm."), (load(aligned).model, None)):
        names = {(prefix + name) if prefix else name.removeprefix("model."): name for name in wanted}
        found = open_checkpoint(base, names, trained=Layout.of(module))
        memory = open_checkpoint(module, names)
        for name, own in names.items():
            assert torch.equal(found.weight(name), wanted[own])
            assert memory.shape(name) == found.shape(name)


def test_one_expert_reads_its_own_tensors_alone(pairs, monkeypatch):
    read, opened = [], weight_files._opened

    class Noted:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def get_tensor(self, key):
            read.append(key)
            return self.file.get_tensor(key)

    class Opened:
        def __init__(self, path):
            self.context = opened(path)

        def __enter__(self):
            return Noted(self.context.__enter__())

        def __exit__(self, *error):
            return self.context.__exit__(*error)

    monkeypatch.setattr(weight_files, "_opened", Opened)
    checkpoint = open_checkpoint(pairs("olmoe")[0], [f"{UP}[10]", f"{DOWN}[2]"])
    assert read == []
    checkpoint.weight(f"{UP}[10]")
    assert read == [f"model.layers.1.mlp.experts.10.{kind}_proj.weight" for kind in ("gate", "up")]
    assert checkpoint.dtype(f"{DOWN}[2]") == torch.float32


def resaved(folder: Path, output: Path, change) -> Path:
    """A copy of a checkpoint whose file holds what ``change`` makes of its state."""
    output.mkdir()
    (output / "config.json").write_text((folder / "config.json").read_text())
    save_file(change(load_file(folder / WEIGHTS)), output / WEIGHTS)
    return output


def test_files_that_hold_all_experts_in_one_tensor(pairs, tmp_path, monkeypatch):
    wanted = experts_of(pairs("mixtral")[0])
    fused = {name: weight for name, weight in load(pairs("mixtral")[0]).state_dict().items() if weight.ndim == 3}

    def as_in_memory(state):
        others = {key: value for key, value in state.items() if ".experts." not in key}
        return others | {name: weight.contiguous() for name, weight in fused.items()}

    folder = resaved(pairs("mixtral")[0], tmp_path / "fused", as_in_memory)
    monkeypatch.setattr(checkpoints, "load_through_transformers", never)
    for place in (folder, tmp_path / "without a config"):
        if place != folder:
            place.mkdir()
            (place / WEIGHTS).symlink_to(folder / WEIGHTS)
        found = open_checkpoint(place, wanted)
        assert all(torch.equal(found.weight(name), weight) for name, weight in wanted.items())


class Twice(MergeModulelist):
    """An operation that nothing is known of."""

    def convert(self, input_dict, source_patterns, target_patterns, **_):
        return {target_patterns[0]: 2 * next(iter(input_dict.values()))}


def test_where_only_loading_tells_the_model_is_loaded_with_a_warning(pairs, monkeypatch, caplog):
    mapping = get_checkpoint_conversion_mapping("mixtral")
    other = [
        WeightConverter([".experts.*.w2.weight"], [".experts.down_proj"], [MergeModulelist(dim=0), Twice()])
        if isinstance(each, WeightConverter) and len(each.source_patterns) == 1
        else each
        for each in mapping
    ]
    register_checkpoint_conversion_mapping("mixtral", other, overwrite=True)
    try:
        with caplog.at_level(logging.WARNING):
            found = open_checkpoint(pairs("mixtral")[0], [f"{DOWN}[3]"])
        assert f"no names tell which weight in the files is that of '{DOWN}[3]'" in caplog.text
        assert torch.equal(found.weight(f"{DOWN}[3]"), 2 * load_file(pairs("mixtral")[0] / WEIGHTS)[W2])
    finally:
        register_checkpoint_conversion_mapping("mixtral", mapping, overwrite=True)


def test_an_expert_that_is_not_there_and_one_that_is_packed(pairs, tmp_path):
    base = pairs("mixtral")[0]
    with pytest.raises(ValueError, match=r"expected a weight for the module '.*down_proj\[4\]'.*down_proj\[3\]"):
        open_checkpoint(base, [f"{DOWN}[4]"])

    def packed(state):
        others = {key: value for key, value in state.items() if ".experts." not in key}
        return others | {f"{DOWN}_{part}": torch.ones(4, 2, 2, 2, dtype=torch.uint8) for part in ("blocks", "scales")}

    folder = resaved(base, tmp_path / "packed", packed)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "mxfp4"}}))
    with pytest.raises(
        ValueError, match=r"'.*down_proj\[1\]' is quantized \(packed, with down_proj_blocks, down_proj"
    ):
        open_checkpoint(folder, [f"{DOWN}[1]"])


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])  # the former's modules have other names in files, too
def test_a_subspace_by_default_and_by_last_parts_of_names_has_the_experts(pairs, name):
    folders = pairs(name)
    whole = SafetySubspace.estimate(*folders, rank=2, progress=False)
    some = SafetySubspace.estimate(*folders, ["down_proj", "mlp.gate"], rank=2, progress=False)
    in_memory = SafetySubspace.estimate(folders[0], load(folders[1]), rank=2, progress=False)
    experts = experts_of(folders[0]).keys()
    assert experts <= whole.keys() == in_memory.keys()
    assert some.keys() == {name for name in whole if "down_proj[" in name or name.endswith("mlp.gate")}
    assert whole.fingerprint == in_memory.fingerprint
    for name, basis in some.items():
        assert torch.equal(basis.U, whole[name].U)
    base, aligned = map(weights, folders)
    for number in range(4):
        D = aligned[UP][number] - base[UP][number]
        assert whole[f"{UP}[{number}]"].displacement == pytest.approx(D.norm().item(), rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 6), st.integers(1, 6))
def test_factors_of_experts_are_split_and_joined_as_peft_multiplies_them(experts, rank, d_out, d_in):
    lora_A, lora_B = torch.randn(experts * rank, d_in), torch.randn(d_out, rank * experts)
    apart = split_experts(lora_A, lora_B, experts)
    stacked = torch.einsum(
        "ore,eri->eoi", lora_B.reshape(d_out, rank, experts), lora_A.reshape(experts, rank, d_in)
    )  # as peft.tuners.lora.layer.ParamWrapper does
    for (A, B), delta in zip(apart, stacked, strict=True):
        torch.testing.assert_close(B @ A, delta)
        assert A.data_ptr() in range(lora_A.data_ptr(), lora_A.data_ptr() + lora_A.nbytes)  # a view
    for whole, joined in zip((lora_A, lora_B), join_experts(apart), strict=True):
        assert torch.equal(whole, joined)


def test_mixtral_is_what_these_tests_take_it_for(pairs):
    assert isinstance(load(pairs("mixtral")[0]), MixtralForCausalLM)
    assert W2 in load_file(pairs("mixtral")[0] / WEIGHTS)
