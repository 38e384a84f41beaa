"""After training: expanded adapters of any ranks and scalings, embeddings and biases, and what PEFT converts to LoRA.

Each is compared with a dense float64 computation on what PEFT merges.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import preprocess_loraga
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from transformers import AutoModelForCausalLM

from csulora_callback import Penalty, SafetySubspace, correct_adapter
from csulora_callback.models.adapters import find_adapter
from csulora_callback.sidecar import Sidecar
from tests.helpers.command_line import run as run_command
from tests.helpers.dense import STRENGTH, closest, displacement_of, matrices, merged, updates
from tests.helpers.lab import (
    TARGETS,
    Tokens,
    assert_same,
    make_trainer,
    raw,
    saved,
    saved_pair,
    tiny_gpt2,
    tiny_llama,
    with_biases,
    with_lora,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's, of tied weights and of embeddings that are saved

RANK, LORA_RANK = 3, 4
PENALTY = Penalty.csulora(STRENGTH)
EMBEDDINGS, BIASES = ["embed_tokens", "v_proj"], {"lora_bias": True}
slow = pytest.mark.slow


EXPANDED = {
    "embedding": (tiny_llama, {"target_modules": EMBEDDINGS}),
    "biases": (with_biases, BIASES),
    "rank-stabilized": (
        tiny_llama,
        {
            "target_modules": EMBEDDINGS,
            "use_rslora": True,
            "rank_pattern": {"embed_tokens": 2, "layers.0.self_attn.v_proj": 12},
            "alpha_pattern": {"embed_tokens": 3, "layers.1.self_attn.v_proj": 0.5},
        },
    ),
    "rank-stabilized biases": (
        with_biases,
        {
            **BIASES,
            "use_rslora": True,
            "rank_pattern": {"q_proj": 3, "down_proj": 11},
            "alpha_pattern": {"layers.1.self_attn.v_proj": 0.5, "q_proj": 5},
        },
    ),
    "gpt2": (tiny_gpt2, {"target_modules": ["wte", "c_attn"], "use_rslora": True, "rank_pattern": {"wte": 3}}),
    "gpt2's biases": (tiny_gpt2, {"target_modules": ["c_attn", "c_proj"], "use_rslora": True, "r": 3, **BIASES}),
}


def untrained(pair, folder: Path, lora: dict) -> Path:
    """An adapter of random numbers, its biases too, which PEFT leaves at zero."""
    model = with_lora(AutoModelForCausalLM.from_pretrained(pair[1]), **{"init_lora_weights": False, **lora})
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B.default.bias"):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "case", [case if case == "rank-stabilized" else pytest.param(case, marks=slow) for case in EXPANDED]
)
def test_an_expanded_adapter_is_the_closest_safe_update_whole_as_peft_merges_it(case, tmp_path):
    build, lora = EXPANDED[case]
    pair = saved_pair(tmp_path, build())
    trained = untrained(pair, tmp_path / "trained", lora)
    modules = {name.removesuffix(".bias") for name in updates(pair[1], trained)}
    subspace = SafetySubspace.estimate(*pair, sorted(modules), rank=RANK, progress=False)
    done = correct_adapter(trained, subspace, tmp_path / "safe", PENALTY, rank="expand")
    assert done.metrics["csulora/truncation_error"] == 0.0
    config = json.loads((tmp_path / "safe/adapter_config.json").read_text())
    assert not any("bias" in name for pattern in ("rank_pattern", "alpha_pattern") for name in config[pattern])
    base, aligned = (matrices(side) for side in pair)
    before, after = updates(pair[1], trained), merged(pair[1], tmp_path / "safe")
    for name, update in before.items():
        expected = closest(displacement_of(name, base, aligned), update, RANK)
        assert (after[name] - expected).norm() < 1e-6 * expected.norm(), name
    assert all(after[name].norm() == 0 for name in after.keys() - before.keys() - {"lm_head"})
    assert_same(raw(tmp_path / "safe"), saved(trained))


COMMANDED = {
    "embedding": (tiny_llama, {"target_modules": EMBEDDINGS}, "model.embed_tokens"),
    "biases": (with_biases, BIASES, "model.layers.1.mlp.down_proj.bias"),
}


@slow
@pytest.mark.parametrize("case", COMMANDED)
def test_the_command_inspects_and_corrects_them(case, tmp_path):
    """Without a subspace at hand: it is estimated for what the adapter adapts."""
    build, lora, name = COMMANDED[case]
    pair = saved_pair(tmp_path, build())
    trained = untrained(pair, tmp_path / "trained", lora)
    sides = ("--base", pair[0], "--aligned", pair[1])
    status, said, error = run_command("inspect", trained, *sides, "--json")
    assert status == 0, error
    assert name.rpartition(".")[2] in said
    status, _, error = run_command("correct", trained, "-o", tmp_path / "safe", *sides, "--penalty", "guard")
    assert status == 0, error
    module = Sidecar.load(tmp_path / "safe").record["modules"][name]
    assert module["subspace"]["rank"] == 4  # of a bias its module's
    if case == "biases":  # two blocks are empty, and the other two hold all of it
        update = updates(pair[1], trained)[name]
        assert module["energy"]["aligned"] == module["energy"]["input"] == 0.0
        assert module["energy"]["output"] + module["energy"]["off"] == pytest.approx(update.square().sum().item())
        assert module["energy"]["output"] > 0.0


INITIALIZATIONS = {
    "pissa": {},
    "pissa_niter_4": {"use_rslora": True},
    "olora": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "corda": {"corda_config": CordaConfig(corda_method="kpm")},
    "lora_ga": {"lora_ga_config": LoraGAConfig()},
}


def prepare(model, config: LoraConfig) -> None:
    """What PEFT wants done before two of the initializations."""
    ids = Tokens(count=8).tokens
    if config.init_lora_weights == "corda":
        preprocess_corda(model, config, run_model=lambda: [model(row[None]) for row in ids])
    elif config.init_lora_weights == "lora_ga":
        preprocess_loraga(model, config, lambda: model(input_ids=ids, labels=ids).loss.backward())


@slow
@pytest.mark.parametrize("start", INITIALIZATIONS)
def test_what_peft_converts_to_plain_lora_is_corrected_exactly(pair, start, tmp_path, monkeypatch):
    """The lines of the refusal: the update is what PEFT merges, less the weights that the adapter was begun from."""
    monkeypatch.chdir(tmp_path)
    lora = {"r": LORA_RANK, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    config = LoraConfig(**lora, init_lora_weights=start, **INITIALIZATIONS[start])
    model = AutoModelForCausalLM.from_pretrained(pair[1])
    prepare(model, config)
    model = get_peft_model(model, config)
    with pytest.raises(ValueError, match="is not supported") as refusal:
        find_adapter(model)
    before, after, command = re.findall(r"(model\.save_pretrained\(.*?\)|csulora correct [^.]*)", str(refusal.value))
    exec(before, {"model": model})
    make_trainer(model, tmp_path / "out", save_strategy="no").train()
    exec(after, {"model": model})
    status, _, error = run_command(*command.split()[1:], "--base", pair[0], "--aligned", pair[1])
    assert status == 0, error
    base, aligned = (matrices(side) for side in pair)
    after = model.double().merge_and_unload()
    found = updates(pair[1], tmp_path / "safe")
    assert found
    for name, corrected in found.items():
        update = after.get_submodule(name).weight.detach() - aligned[name]
        rank = 2 * config.rank_pattern.get(name.rpartition(".")[2], LORA_RANK)
        expected = closest(aligned[name] - base[name], update, 4, rank, strength=10.0)
        assert (corrected - expected).norm() < 1e-4 * expected.norm(), name  # the difference of float32 weights
        assert (corrected - update).norm() > 0.1 * update.norm(), name
