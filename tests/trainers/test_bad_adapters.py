"""Adapters that cannot be corrected are refused as what they are, with what to do about it, before the first step."""

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM

from csulora_callback import CSULoRACallback
from csulora_callback.models.adapters import find_adapter
from csulora_callback.models.supported import check_tuner
from tests.helpers import trl as in_trl
from tests.helpers.lab import RANK, TARGETS, make_trainer, with_lora

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"


def refusal(pair, tmp_path, model, *parts: str) -> None:
    """Training a model raises an error that says all of this, and writes nothing."""
    callback = CSULoRACallback(base_model=pair[0], rank=RANK, cache_dir=tmp_path / "cache")
    trainer = make_trainer(model, tmp_path / "output", [callback])
    with pytest.raises(ValueError, match=r"expected|is not supported") as raised:
        trainer.train()
    for part in parts:
        assert part in str(raised.value)
    assert not [path for path in (tmp_path / "output").rglob("*") if path.is_file()]
    assert trainer.state.global_step == 0


def lora(**settings):
    return lambda model: with_lora(model, **settings)


def tuned(config):
    return lambda model: get_peft_model(model, config)


def with_trained_norm(model):
    model = with_lora(model)
    model.base_model.model.model.norm.weight.requires_grad_(True)
    return model


def with_second_trained(model):
    model = with_lora(model)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["k_proj"]))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    return model


NOT_LORA = "Train with peft.LoraConfig instead."
ADAPTERS = {
    "AdaLoRA": (
        tuned(AdaLoraConfig(target_modules=TARGETS, task_type="CAUSAL_LM", total_step=10, init_r=4)),
        ["`model`: expected an adapter of LoraConfig, but got one of AdaLoraConfig", NOT_LORA],
    ),
    "IA3": (
        tuned(IA3Config(target_modules=["q_proj"], feedforward_modules=[])),
        ["`model`: expected an adapter of LoraConfig, but got one of IA3Config", NOT_LORA],
    ),
    "LoHa": (
        tuned(LoHaConfig(r=2, target_modules=["q_proj"])),
        ["`model`: expected an adapter of LoraConfig, but got one of LoHaConfig", NOT_LORA],
    ),
    "VeRA": (
        tuned(VeraConfig(r=2, target_modules=["q_proj"])),
        ["`model`: expected an adapter of LoraConfig, but got one of VeraConfig", NOT_LORA],
    ),
    "DoRA": (lora(use_dora=True), ["DoRA (use_dora=True) is not supported", "Train with use_dora=False."]),
    "a variant": (
        lora(alora_invocation_tokens=[3], target_modules=["q_proj"]),
        [f"module '{Q}': a variant of LoRA (ALoraLinearVariant)", "Leave out the option of the LoraConfig that asks"],
    ),
    "PiSSA": (
        lora(init_lora_weights="pissa_niter_4"),
        [
            "LoRA with init_lora_weights='pissa_niter_4' is not supported: a part of the base weight lives in",
            "path_initial_model_for_weight_conversion='start') after it, and csulora correct plain",
        ],
    ),
    "a norm": (
        with_trained_norm,
        [
            "module 'model.norm.weight': a parameter trained outside the LoRA factors",
            "Freeze it: requires_grad_(False)",
        ],
    ),
    "two adapters": (
        with_second_trained,
        ["a second adapter that is trained is not", "Train one at a time: model.set_adapter(name)"],
    ),
    "modules_to_save": (
        lora(modules_to_save=["model.norm"]),
        ["module 'model.norm': modules_to_save of a module with weight", "uncorrected=['model.norm']"],
    ),
    "trained tokens": (
        lora(trainable_token_indices=[3, 4]),
        ["module 'model.embed_tokens': trainable_token_indices of tokens that the aligned model has", "TRL sets that"],
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_are_refused_as_what_they_are(pair, tmp_path, kind):
    build, parts = ADAPTERS[kind]
    refusal(pair, tmp_path, build(AutoModelForCausalLM.from_pretrained(pair[1])), *parts)


def test_biases_that_are_trained(pair, tmp_path):
    biased = AutoModelForCausalLM.from_pretrained(pair[1], attention_bias=True)
    parts = ["self_attn.q_proj.bias': a bias that is trained is not supported", "Set bias='none' in the LoraConfig"]
    refusal(pair, tmp_path, with_lora(biased, bias="all"), *parts)


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), float("-inf")])
def test_a_scaling_that_is_no_number(pair, tmp_path, alpha):
    message = (
        f"`lora_alpha`: expected a finite number, but got {alpha!r}, which makes the scaling of its update {alpha}."
    )
    model = with_lora(AutoModelForCausalLM.from_pretrained(pair[1]), lora_alpha=alpha)
    refusal(pair, tmp_path, model, f"module '{Q}': {message}", "Set another lora_alpha or alpha_pattern")
    model = with_lora(AutoModelForCausalLM.from_pretrained(pair[1]), alpha_pattern={"down_proj": alpha})
    refusal(pair, tmp_path, model, f"module '{DOWN}': {message}")


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
def test_configs_without_layers_of_their_own(config):
    check_tuner(LoraConfig())
    with pytest.raises(ValueError, match=f"expected an adapter of LoraConfig, but got one of {config.__name__}"):
        check_tuner(config(num_virtual_tokens=2, task_type="CAUSAL_LM"))


def test_plain_initializations_in_any_spelling_that_peft_takes(pair):
    for start in ("Gaussian", "gaussian", None, False):
        model = with_lora(AutoModelForCausalLM.from_pretrained(pair[1]), init_lora_weights=start)
        assert len(find_adapter(model).layers) == 6
    model = with_lora(AutoModelForCausalLM.from_pretrained(pair[1]), init_lora_weights="OLoRA")
    with pytest.raises(ValueError, match="LoRA with init_lora_weights='OLoRA' is not supported: a part of the base"):
        find_adapter(model)


def test_trl_with_a_template_from_a_file_adds_none(pair, tmp_path):
    in_trl.words().save_pretrained(pair[1])
    (tmp_path / "chat.jinja").write_text("<bos> {{ messages[0]['content'] }}")
    callback = CSULoRACallback(base_model=pair[0], rank=RANK, cache_dir=tmp_path / "cache")
    trainer = in_trl.make_trainer(
        pair, tmp_path / "out", [callback], chat_template_path=str(tmp_path / "chat.jinja"), max_steps=2
    )
    trainer.train()
    assert (tmp_path / "out/checkpoint-2/csulora/correction.json").is_file()
    assert not any(torch.isnan(parameter).any() for parameter in trainer.model.parameters())
