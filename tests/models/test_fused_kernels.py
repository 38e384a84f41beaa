"""Layers that are computed past their forward, as fused LoRA kernels do it: recognized by that, before training."""

import types

import pytest
import torch
from transformers import AutoModelForCausalLM

from csulora_callback import CSULoRACallback, Penalty
from csulora_callback.models.activations import vectors_of
from csulora_callback.models.adapters import find_adapter
from tests.helpers.lab import RANK, make_trainer, tiny_llama, with_lora

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROBES = [[0, 5, 6, 7], [0, 9, 8], [0, 4, 11, 12, 13]]


def weight(layer):
    lora = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    return layer.base_layer.weight + layer.scaling["default"] * lora


def fused_mlp(self, X):
    """Takes the layers' weights and calls none of them, as the kernels for a GPU do."""
    gate, up = X @ weight(self.gate_proj).T, X @ weight(self.up_proj).T
    return (torch.nn.functional.silu(gate) * up) @ weight(self.down_proj).T


def fuse_mlps(model, layers=(0, 1)):
    for layer in layers:
        mlp = model.get_base_model().model.layers[layer].mlp
        mlp.forward = types.MethodType(fused_mlp, mlp)
    return model


def with_all(pair):
    return with_lora(AutoModelForCausalLM.from_pretrained(pair[1]), target_modules=TARGETS)


@pytest.mark.slow
def test_they_are_named_before_training_with_what_to_switch_off(pair, tmp_path):
    ours = CSULoRACallback(base_model=pair[0], rank=RANK, probes=PROBES, penalty=Penalty.data_aware(4.0))
    trainer = make_trainer(fuse_mlps(with_all(pair)), tmp_path, [ours])
    with pytest.raises(ValueError, match=r"^module 'model.layers.0.mlp.gate_proj' and 5 more: ") as refused:
        trainer.train()
    for word in ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "UNSLOTH_FUSED_LORA_DROPOUT=0", "guard(10)"):
        assert word in str(refused.value)
    assert trainer.state.global_step == 0
    assert not list(tmp_path.glob("checkpoint-*"))


def test_one_layer_is_enough():
    model = fuse_mlps(with_lora(tiny_llama(), target_modules=TARGETS), layers=[1])
    with pytest.raises(ValueError, match=r"^module 'model.layers.1.mlp.gate_proj' and 2 more: .*without calling it"):
        vectors_of(find_adapter(model), PROBES)


@pytest.mark.slow
def test_penalties_that_read_weights_do_not_mind(pair, tmp_path):
    ours = CSULoRACallback(base_model=pair[0], rank=RANK, penalty=Penalty.guard(4.0), probes=PROBES)
    trainer = make_trainer(fuse_mlps(with_all(pair)), tmp_path, [ours])
    trainer.train()
    assert any("csulora/refusal_kept_corrected" in record for record in trainer.state.log_history)
