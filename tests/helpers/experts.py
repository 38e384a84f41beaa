"""Tiny mixtures of experts with fused weights, and what a correction makes of each expert, dense and in float64."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests.helpers.lab import RANK, VOCABULARY

STRENGTH = 5.0  # of lab.PENALTY
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
LOW_RANK_ATTENTION = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
}
# DeepSeek's first layer has no experts; gpt-oss' down_proj is square, and only gate_up_proj shows how both are stored.
FAMILIES = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, moe_intermediate_size=12, num_experts=4)),
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**SIZES, num_experts=11)),
    "deepseek_v3": lambda: DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **{**SIZES, **LOW_RANK_ATTENTION},
            moe_intermediate_size=12,
            n_routed_experts=4,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
        )
    ),
    "llama4": lambda: Llama4ForCausalLM(
        Llama4TextConfig(**{**SIZES, "num_experts_per_tok": 1}, intermediate_size_mlp=24, num_local_experts=4)
    ),
    "gpt_oss": lambda: GptOssForCausalLM(
        GptOssConfig(**{**SIZES, "intermediate_size": 16}, num_local_experts=4, layer_types=["full_attention"] * 2)
    ),
}
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj", "router.weight"]
LORA = {
    **{name: {"target_modules": "all-linear"} for name in FAMILIES},
    "gpt_oss": {"target_modules": "all-linear", "target_parameters": PARAMETERS},
    "llama4": {"target_modules": ["q_proj", "v_proj"], "target_parameters": PARAMETERS},
}


@torch.no_grad()
def experts_pair(folder: Path, name: str) -> tuple[Path, Path]:
    """Folders of a base and an aligned checkpoint of a family, which differ in all weights."""
    torch.manual_seed(0)
    model, generator = FAMILIES[name](), torch.Generator().manual_seed(1)
    for parameter in model.parameters():  # some are left as zeros, or at nothing at all
        if parameter.ndim > 1:
            parameter.normal_(0, 0.1)
    model.save_pretrained(folder / "base")
    for parameter in model.parameters():
        if parameter.ndim > 1:  # the subspace is well defined: a gap follows its last singular value
            *stack, rows, columns = parameter.shape
            left = torch.randn(*stack, rows, RANK, generator=generator)
            right = torch.randn(*stack, RANK, columns, generator=generator)
            parameter += 0.02 * left @ right + 0.002 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder / "aligned")
    return folder / "base", folder / "aligned"


def weights(folder: Path) -> dict[str, Tensor]:
    """What transformers loads, in float64."""
    return dict(load(folder).double().state_dict())


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder)


def deltas(aligned: Path, adapter: Path) -> dict[str, tuple[Tensor, int]]:
    """By parameter the update of an adapter as PEFT itself makes it of the factors, in float64, and its rank."""
    model = PeftModel.from_pretrained(load(aligned), adapter).double()
    found = {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            path = name.replace(".base_layer", "")
            parameter = module.parameter_name if isinstance(module, ParamWrapper) else "weight"
            found[f"{path}.{parameter}"] = module.get_delta_weight("default").detach(), module.r["default"]
    return found


def closest(displacement: Tensor, update: Tensor, rank: int) -> Tensor:
    """``X*`` of Penalty.csulora, then its best approximation of a rank; each expert alone, as they are stored."""
    if displacement.ndim == 3:
        return torch.stack([closest(D, delta, rank) for D, delta in zip(displacement, update, strict=True)])
    if not update.any():
        return update
    U, _, Vh = torch.linalg.svd(displacement)
    left, right = U[:, :RANK] @ U[:, :RANK].T, Vh[:RANK].T @ Vh[:RANK]
    aligned = left @ update @ right
    partial = left @ update + update @ right - 2 * aligned
    off = update - aligned - partial
    share = {part: part.square().sum() / update.square().sum() for part in (partial, off)}
    whole = aligned + sum(part / (1 + STRENGTH * share[part]) for part in (partial, off))
    U, sigma, Vh = torch.linalg.svd(whole, full_matrices=False)
    return U[:, :rank] * sigma[:rank] @ Vh[:rank]
