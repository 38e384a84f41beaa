"""Kinds of adapters, and ways to have them corrected: rows and columns of the README's table of what is supported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from csulora_callback import CSULoRACallback, Penalty, SafetySubspace, correct_adapter
from recipes.families.pair import RANK
from recipes.families.reference import STRENGTH
from tests.helpers import lightning as in_lightning
from tests.helpers import trl as in_trl
from tests.helpers.lab import TARGETS, VOCABULARY, make_trainer, tiny_llama, with_lora
from tests.helpers.quantized import (
    PackedLinear,
    by_torchao,
    in_eight_bits,
    in_four_bits,
    packed,
    quantized,
    unquantized,
)

PENALTY = Penalty.guard(STRENGTH)
Build = Callable[[Path], PeftModel]  # from the aligned checkpoint's folder


def llama() -> nn.Module:
    return unquantized("llama")


def gpt2() -> nn.Module:
    return unquantized("gpt2")


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    return MixtralForCausalLM(
        MixtralConfig(**sizes, **heads, max_position_embeddings=32, bos_token_id=0, eos_token_id=1)
    )


def lora(**settings) -> Build:
    return lambda aligned: with_lora(AutoModelForCausalLM.from_pretrained(aligned), **settings)


def tuner(config) -> Build:
    return lambda aligned: get_peft_model(AutoModelForCausalLM.from_pretrained(aligned), config())


def with_a_second(aligned: Path) -> PeftModel:
    model = lora()(aligned)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["k_proj"]))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    return model


CORRECTED: dict[str, tuple[Callable[[], nn.Module], Build]] = {
    "LoRA": (llama, lora()),
    "rsLoRA": (llama, lora(use_rslora=True)),
    "`rank_pattern`, `alpha_pattern`": (
        llama,
        lora(use_rslora=True, rank_pattern={"v_proj": 2}, alpha_pattern={"layers.0.mlp.down_proj": 3}),
    ),
    "`layers_to_transform`": (llama, lora(layers_to_transform=[1])),
    '`init_lora_weights` `"gaussian"`, `"orthogonal"`': (llama, lora(init_lora_weights="orthogonal")),
    "`Conv1D` (GPT-2)": (gpt2, lora(target_modules="all-linear")),
    "attention beside fused experts": (mixtral, lora(target_modules=["q_proj", "v_proj"])),
    "QLoRA, bitsandbytes nf4": (llama, lambda aligned: quantized(aligned, in_four_bits())),
    "QLoRA, bitsandbytes fp4": (llama, lambda aligned: quantized(aligned, in_four_bits(bnb_4bit_quant_type="fp4"))),
    "bitsandbytes int8": (llama, lambda aligned: quantized(aligned, in_eight_bits())),
    "torchao int8": (llama, lambda aligned: quantized(aligned, by_torchao())),
    "GPTQ, HQQ and alike": (llama, lambda aligned: packed(aligned, PackedLinear)),
}

LIKE = {"target_modules": TARGETS, "task_type": "CAUSAL_LM"}
# A word of the refusal for each.
REFUSED: dict[str, tuple[Callable[[], nn.Module], Build, str]] = {
    '`bias="all"`, `"lora_only"`': (
        lambda: tiny_llama(attention_bias=True),
        lora(bias="all"),
        "bias",
    ),
    "norms and the like in `modules_to_save`": (llama, lora(modules_to_save=["norm"]), "modules_to_save"),
    "rows of known tokens (`trainable_token_indices`)": (
        llama,
        lora(trainable_token_indices=[3]),
        "trainable_token_indices",
    ),
    "DoRA": (llama, lora(use_dora=True), "use_dora=True"),
    "PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA": (llama, lora(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
    "a second adapter that is trained": (llama, with_a_second, "a second adapter that is trained"),
    "aLoRA and other variants": (llama, lora(alora_invocation_tokens=[3]), "alora"),
    "`layer_replication`": (llama, lora(layer_replication=[[0, 2], [1, 2]]), "layer_replication"),
    "AdaLoRA": (llama, tuner(lambda: AdaLoraConfig(**LIKE, total_step=10, init_r=4)), "AdaLoraConfig"),
    "VeRA": (llama, tuner(lambda: VeraConfig(r=2, target_modules=["q_proj"])), "VeraConfig"),
    "LoHa": (llama, tuner(lambda: LoHaConfig(r=2, **LIKE)), "LoHaConfig"),
    "LoKr": (llama, tuner(lambda: LoKrConfig(r=2, **LIKE)), "LoKrConfig"),
    "OFT": (llama, tuner(lambda: OFTConfig(oft_block_size=4, r=0, **LIKE)), "OFTConfig"),
    "IA3": (llama, tuner(lambda: IA3Config(target_modules=["q_proj"], feedforward_modules=[])), "IA3Config"),
    "prompt tuning": (
        llama,
        tuner(lambda: PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")),
        "PromptTuningConfig",
    ),
    "prefix tuning": (
        llama,
        tuner(lambda: PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")),
        "PrefixTuningConfig",
    ),
}


class InLightning(in_lightning.Module):
    """Holds any model."""

    def __init__(self, model: PeftModel) -> None:
        super().__init__(Path(), late=True)
        self.network = model


def in_trainer(pair, model: PeftModel, output: Path, callbacks: list) -> Path:
    make_trainer(model, output, callbacks, max_steps=2, save_steps=2).train()
    return output / "checkpoint-2"


def in_lightnings(pair, model: PeftModel, output: Path, callbacks: list) -> Path:
    saves = ModelCheckpoint(output, "last", every_n_train_steps=2)
    in_lightning.fit(pair, output, [*callbacks, saves], InLightning(model), max_steps=2, max_epochs=-1)
    return output / "last.adapter"


def in_trls(pair, model: PeftModel, output: Path, callbacks: list) -> Path:
    in_trl.words().save_pretrained(pair[1])
    in_trl.make_trainer(pair, output, callbacks, model, max_steps=2, save_steps=2, eval_strategy="no").train()
    return output / "checkpoint-2"


TRAINERS = {"Trainer": in_trainer, "Lightning": in_lightnings, "TRL": in_trls}
AFTERWARDS = "afterwards"
COLUMNS = (*TRAINERS, AFTERWARDS)


def corrected(column: str, pair, model: PeftModel, output: Path) -> Path:
    """The folder with what was trained and corrected in the way of a column."""
    if column in TRAINERS:
        callback = CSULoRACallback(pair[0], rank=RANK, penalty=PENALTY, cache_dir=output / "cache")
        return TRAINERS[column](pair, model, output, [callback])
    trained = in_trainer(pair, model, output, [])
    names = [name for name, module in model.get_base_model().named_modules() if isinstance(module, LoraLayer)]
    subspace = SafetySubspace.estimate(*pair, names, rank=RANK, progress=False)
    return correct_adapter(trained, subspace, output / "corrected", PENALTY).output
