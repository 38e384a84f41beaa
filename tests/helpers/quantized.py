"""Quantized models, by the real libraries where they are installed, and what has to come out of training on them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora.gptq import GPTQLoraLinear
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel, TorchAoConfig
from transformers.pytorch_utils import Conv1D

from csulora_callback import correct
from tests.helpers.lab import PENALTY, RANK, SCALING, TARGETS, VOCABULARY, tiny_llama, with_lora


def in_four_bits(**options) -> BitsAndBytesConfig:
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_4bit=True, **{"bnb_4bit_quant_type": "nf4", **options})


def in_eight_bits(**options) -> BitsAndBytesConfig:
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_8bit=True, **options)


def by_torchao(**options) -> TorchAoConfig:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(quant_type=Int8WeightOnlyConfig(), **options)


def unquantized(name: str) -> nn.Module:
    if not name.startswith("gpt2"):
        return tiny_llama(hidden_size=64, intermediate_size=128)
    torch.manual_seed(0)
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=32, **special)
    )


def quantized(folder: Path, config, **lora) -> PeftModel:
    """The model in a folder quantized on loading, as QLoRA's recipes prepare it, with a fresh adapter."""
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")
    return with_lora(prepare_model_for_kbit_training(model, use_gradient_checkpointing=False), **lora)


@torch.no_grad()
def matrices(folder: Path) -> dict[str, torch.Tensor]:
    """Weights of linear modules in float64 as ``(d_out, d_in)``, by module name, read by transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder).double()
    return {
        name: module.weight.T if isinstance(module, Conv1D) else module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }


def updates(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``B·A`` in float64 by module name."""
    return {
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): (
            state[key.replace("lora_A", "lora_B")].double() @ lora_A.double()
        )
        for key, lora_A in state.items()
        if ".lora_A." in key
    }


def assert_corrected(corrected: dict, raw: dict, base: Path, aligned: Path) -> None:
    """What is saved is the correction of what was trained, by the displacement of the weights in full precision."""
    written, base, aligned = updates(corrected), matrices(base), matrices(aligned)
    assert written
    for name, update in updates(raw).items():
        U, _, Vh = torch.linalg.svd(aligned[name] - base[name])
        lora_A, lora_B = (raw[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
        by_hand = correct(lora_A, lora_B, U[:, :RANK], Vh[:RANK].T, PENALTY, SCALING)
        expected = by_hand.lora_B @ by_hand.lora_A
        assert (written[name] - expected).norm() < 1e-5 * expected.norm(), name
        assert (written[name] - update).norm() > 0.1 * update.norm(), name


class PackedLinear(nn.Module):
    """A layer as GPTQ's: whole numbers of 4 bits in int32 and scales under names of their own, and no ``weight``."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        scales = linear.weight.detach().abs().amax(1, keepdim=True) / 7
        codes = (linear.weight.detach() / scales).round().to(torch.int32) + 8
        packed = torch.zeros(self.out_features, self.in_features // 8, dtype=torch.int32)
        for place in range(8):
            packed |= codes[:, place::8] << 4 * place
        self.register_buffer("qweight", packed)
        self.register_buffer("scales", scales)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        codes = torch.stack([(self.qweight >> 4 * place) & 15 for place in range(8)], dim=-1)
        weight = (codes.flatten(1) - 8) * self.scales
        return nn.functional.linear(x, weight)


class EmptyWeightLinear(PackedLinear):
    """A layer as HQQ's, whose ``weight`` is there for those who ask for its dtype, and holds nothing."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.W_q = nn.Parameter(self.qweight, requires_grad=False)

    @property
    def weight(self) -> torch.Tensor:
        return torch.empty(0)


LOOKS = {PackedLinear: "qweight, scales", EmptyWeightLinear: "W_q, qweight, scales"}


def packed(folder: Path, kind: type[PackedLinear]) -> PeftModel:
    """PEFT's own layer for GPTQ over packed ones, with the library that makes them not installed."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    for name, module in list(model.named_modules()):
        if name.endswith(tuple(TARGETS)):
            model.set_submodule(name, kind(module))
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, lora_dropout=0.1, task_type="CAUSAL_LM")
    config._register_custom_module({kind: GPTQLoraLinear})
    torch.manual_seed(2)
    return get_peft_model(model, config)
