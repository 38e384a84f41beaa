"""Tiny real models, data and trainers that the tests share. Everything is deterministic."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import TypeVar

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from csulora_callback import Penalty, SafetySubspace, correct
from csulora_callback.models.adapters import find_adapter
from csulora_callback.models.factors import from_peft_state_dict, to_peft_state_dict

VOCABULARY = 32
DEVICE = os.environ.get("CSULORA_TEST_DEVICE", "cpu")  # where the trainers train: cpu or cuda
PENALTY = Penalty.csulora(5.0)
RANK = 3
SCALING = 2.0  # of with_lora
TARGETS = ["q_proj", "v_proj", "down_proj"]
Model = TypeVar("Model", bound=nn.Module)


def tiny_llama(seed: int = 0, **overrides) -> LlamaForCausalLM:
    """A Llama with grouped-query attention, two layers, about 6,000 parameters."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **overrides}))


def with_biases() -> LlamaForCausalLM:
    """The tiny Llama with a bias in every layer."""
    return tiny_llama(attention_bias=True, mlp_bias=True)


def tiny_gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """Its layers are Conv1D, with biases, and its token embedding is tied to the output."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=1, pad_token_id=2))


@torch.no_grad()
def align(base: Model, seed: int = 1, rank: int = 4, scale: float = 0.3) -> Model:
    """A copy of ``base`` whose matrices are displaced, mostly within ``rank`` directions."""
    generator = torch.Generator().manual_seed(seed)
    aligned = copy.deepcopy(base)
    for parameter in aligned.parameters():
        if parameter.ndim == 2:
            left = torch.randn(parameter.shape[0], rank, generator=generator)
            right = torch.randn(rank, parameter.shape[1], generator=generator)
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += (scale * left @ right / rank + 0.01 * noise).to(parameter.dtype) * parameter.std()
    return aligned


def saved_pair(folder: Path, base: PreTrainedModel | None = None) -> tuple[Path, Path]:
    """Folders of a base and an aligned checkpoint."""
    base = tiny_llama() if base is None else base
    base.save_pretrained(folder / "base")
    align(base).save_pretrained(folder / "aligned")
    return folder / "base", folder / "aligned"


def with_lora(model: nn.Module, seed: int = 2, **lora) -> PeftModel:
    """The model with a fresh LoRA adapter."""
    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    return get_peft_model(model, LoraConfig(**{**settings, **lora}))


class Tokens(torch.utils.data.Dataset):
    """Random token sequences of fixed length, with labels."""

    def __init__(self, count: int = 32, length: int = 8, seed: int = 3) -> None:
        self.tokens = torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def saved(folder: Path) -> dict[str, torch.Tensor]:
    """The adapter that a checkpoint folder gives to whoever loads it."""
    return load_file(folder / "adapter_model.safetensors")


def raw(folder: Path) -> dict[str, torch.Tensor]:
    """The uncorrected adapter beside it."""
    return load_file(folder / "csulora" / "raw" / "adapter_model.safetensors")


def live(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapter of a model in memory."""
    return to_peft_state_dict(find_adapter(model).read())


def corrected_by_hand(state: dict[str, torch.Tensor], subspace: SafetySubspace) -> dict[str, torch.Tensor]:
    """The correction of a raw adapter; `correct` has its own tests against dense references."""
    result = {}
    for name, (lora_A, lora_B) in from_peft_state_dict(state, list(subspace), "raw").items():
        done = correct(lora_A.to(DEVICE), lora_B.to(DEVICE), subspace[name].U, subspace[name].V, PENALTY, SCALING)
        result[name] = (done.lora_A, done.lora_B)
    return to_peft_state_dict(result)


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """Equal bit for bit, wherever they lie."""
    assert left.keys() == right.keys()
    for key in left:
        assert torch.equal(left[key].cpu(), right[key].cpu()), key


TRAINING = {
    "max_steps": 8,
    "per_device_train_batch_size": 4,
    "learning_rate": 2e-2,
    "logging_steps": 1,
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": DEVICE == "cpu",
    "seed": 7,
    "dataloader_pin_memory": False,
}


def make_trainer(model: nn.Module, output: Path, callbacks: list | None = None, **arguments) -> Trainer:
    """A real Trainer that takes 8 steps of 4 sequences by default, quietly."""
    settings = {**TRAINING, "output_dir": str(output), "save_steps": 4, **arguments}
    return Trainer(
        model=model,
        args=TrainingArguments(**settings),
        train_dataset=Tokens(),
        eval_dataset=Tokens(count=8, seed=4),
        callbacks=callbacks,
    )
