"""The callback on the architectures people fine-tune: trained, saved, and loaded again by PEFT in a new process.

What a checkpoint does to each weight is compared with a dense float64 computation that shares no code with the
library: projectors from a full SVD, then the best approximation of rank ``r``.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from csulora_callback import CSULoRACallback, Penalty
from tests.helpers.lab import DEVICE, VOCABULARY, Tokens, make_trainer, saved_pair, tiny_llama, with_lora

RANK = 3
STRENGTH = 5.0
LORA_RANK = 4
SCALING = 2.0  # with_lora: lora_alpha 8 over r 4

SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    **SPECIAL,
}
# In "opt" the embeddings are narrower than the layers, so that there are linear modules outside any layer.
ARCHITECTURES = {
    "llama": tiny_llama,
    "llama in bf16": lambda: tiny_llama().bfloat16(),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**{**SIZES, "head_dim": 8, "num_key_value_heads": 1})),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=4, n_positions=32, **SPECIAL)
    ),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            word_embed_proj_dim=12,
            ffn_dim=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=32,
            **SPECIAL,
        )
    ),
}
CASES = [pytest.param(name, marks=() if name in ("llama", "gpt2") else pytest.mark.slow) for name in ARCHITECTURES]
# A part of the names of modules that "all-linear" must have reached, by what is special about the architecture.
TYPICAL = {
    "qwen2": ["self_attn.q_proj", "self_attn.k_proj"],
    "gpt2": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
    "opt": ["project_in", "project_out", "self_attn.out_proj", "fc1", "fc2"],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """By architecture, once each: the same training with and without the callback, and where it was saved."""
    done = {}

    def run(name: str) -> SimpleNamespace:
        if name not in done:
            folder = tmp_path_factory.mktemp("architecture")
            torch.manual_seed(0)
            base, aligned = saved_pair(folder, ARCHITECTURES[name]())
            callback = CSULoRACallback(
                base_model=base, rank=RANK, penalty=Penalty.csulora(STRENGTH), cache_dir=folder / "cache"
            )
            runs = {}
            for kind, callbacks in (("without", []), ("with", [callback])):
                model = with_lora(AutoModelForCausalLM.from_pretrained(aligned), target_modules="all-linear")
                trainer = make_trainer(model, folder / kind, callbacks, max_steps=4, save_steps=4, logging_steps=4)
                trainer.train()
                runs[kind] = trainer.model.eval()
            done[name] = SimpleNamespace(
                base=base,
                aligned=aligned,
                model=runs["with"],
                raw_model=runs["without"],
                checkpoint=folder / "with" / "checkpoint-4",
                raw_checkpoint=folder / "without" / "checkpoint-4",
            )
        return done[name]

    return run


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model.to(DEVICE)(Tokens(count=4).tokens.to(DEVICE)).logits


def matrices(folder: Path) -> dict[str, torch.Tensor]:
    """Weights of linear modules in float64 as ``(d_out, d_in)``, by module name, read by transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder).double()
    return {
        name: module.weight.detach().T if isinstance(module, Conv1D) else module.weight.detach()
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D))
    }


def updates(folder: Path) -> dict[str, torch.Tensor]:
    """``Δ = s·B·A`` in float64, by module name, from an adapter file."""
    state = {key: value.double() for key, value in load_file(folder / "adapter_model.safetensors").items()}
    ends = ".lora_A.weight"
    return {
        key.removeprefix("base_model.model.").removesuffix(ends): SCALING
        * state[key.replace("lora_A", "lora_B")]
        @ value
        for key, value in state.items()
        if key.endswith(ends)
    }


def dense_correction(displacement: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
    """``X*`` of Penalty.csulora, then its best approximation of rank ``r``."""
    U, _, Vh = torch.linalg.svd(displacement)
    left, right = U[:, :RANK] @ U[:, :RANK].T, Vh[:RANK].T @ Vh[:RANK]
    aligned = left @ update @ right
    partial = left @ update + update @ right - 2 * aligned
    off = update - aligned - partial
    share = {part: part.square().sum() / update.square().sum() for part in (partial, off)}
    closest = aligned + sum(part / (1 + STRENGTH * share[part]) for part in (partial, off))
    U, sigma, Vh = torch.linalg.svd(closest)
    return U[:, :LORA_RANK] * sigma[:LORA_RANK] @ Vh[:LORA_RANK]


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_holds_the_closest_safe_update_of_what_was_trained(trained, name):
    run = trained(name)
    base, aligned, raw = matrices(run.base), matrices(run.aligned), updates(run.raw_checkpoint)
    saved = updates(run.checkpoint)
    assert saved.keys() == raw.keys() == aligned.keys() - {"lm_head"}  # PEFT leaves the output layer out
    for part in TYPICAL.get(name, []):
        assert any(module.endswith(part) for module in saved), part
    for module, update in raw.items():
        expected = dense_correction(aligned[module] - base[module], update)
        assert (saved[module] - expected).norm() < 1e-5 * expected.norm(), module
        assert (saved[module] - update).norm() > 0.1 * update.norm(), module


@pytest.mark.parametrize("name", CASES)
def test_the_raw_adapter_comes_back_from_the_sidecar(trained, name, tmp_path):
    run = trained(name)
    shutil.copytree(run.checkpoint, tmp_path / "restored")
    shutil.copy(
        run.checkpoint / "csulora" / "raw" / "adapter_model.safetensors",
        tmp_path / "restored/adapter_model.safetensors",
    )
    restored = load_file(tmp_path / "restored" / "adapter_model.safetensors")
    without = load_file(run.raw_checkpoint / "adapter_model.safetensors")
    assert restored.keys() == without.keys()
    for key in without:
        assert torch.equal(restored[key], without[key]), key
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(run.aligned), tmp_path / "restored")
    assert torch.equal(logits(model), logits(run.raw_model))


RELOAD = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

tokens, *folders = sys.argv[1:]
for aligned, checkpoint in zip(folders[::2], folders[1::2]):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(aligned), checkpoint)
    ids = torch.load(tokens)
    with torch.no_grad():
        logits = model.to(ids.device)(ids).logits
    merged = model.cpu().double().merge_and_unload().state_dict()
    torch.save((logits, merged), checkpoint + "/reloaded.pt")
assert not any(name.startswith("csulora") for name in sys.modules)
"""


@pytest.mark.slow
def test_peft_alone_in_a_new_process_loads_the_corrected_model(trained, tmp_path):
    runs = {name: trained(name) for name in ARCHITECTURES}
    torch.save(Tokens(count=4).tokens.to(DEVICE), tmp_path / "tokens.pt")
    folders = [str(folder) for run in runs.values() for folder in (run.aligned, run.checkpoint)]
    threads = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # the order of sums, to the bit
    subprocess.run([sys.executable, "-c", RELOAD, str(tmp_path / "tokens.pt"), *folders], check=True, env=threads)

    for name, run in runs.items():
        reloaded, merged = torch.load(run.checkpoint / "reloaded.pt")
        assert torch.equal(reloaded, logits(run.model)), name
        assert not torch.equal(reloaded, logits(run.raw_model)), name
        base, aligned, raw = matrices(run.base), matrices(run.aligned), updates(run.raw_checkpoint)
        for module, update in raw.items():
            expected = dense_correction(aligned[module] - base[module], update)
            weight = merged[f"{module}.weight"]
            stored = weight.T if "gpt2" in name else weight  # Conv1D stores (d_in, d_out)
            assert (stored - aligned[module] - expected).norm() < 1e-5 * expected.norm(), (name, module)
