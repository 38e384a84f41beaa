"""Stored weights are found by name as transformers finds them, through the class that is trained; never by a guess."""

import logging

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    HrmTextConfig,
    HrmTextForCausalLM,
    HYV3Config,
    HYV3ForCausalLM,
    Llama4Config,
    Llama4ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)

from csulora_callback import SafetySubspace
from csulora_callback.models.checkpoint import open_checkpoint
from csulora_callback.models.layout import Layout
from recipes.families.tiny import tiny_config
from tests.helpers.lab import align, tiny_llama

TEXT = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def llama4() -> PreTrainedModel:
    text = {**TEXT, "intermediate_size_mlp": 24, "num_local_experts": 2, "interleave_moe_layer_step": 2}
    vision = {**VISION, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}
    return Llama4ForConditionalGeneration(Llama4Config(text_config=text, vision_config=vision))


def qwen3_5() -> PreTrainedModel:
    linear = {f"linear_{kind}": 2 for kind in ("num_value_heads", "num_key_heads")}
    linear |= {f"linear_{kind}": 4 for kind in ("key_head_dim", "value_head_dim")}
    text = {**TEXT, **linear, "layer_types": ["full_attention", "linear_attention"]}
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "out_hidden_size": 16}
    return Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=text, vision_config=vision))


def llava() -> PreTrainedModel:
    vision = CLIPVisionConfig(**VISION, projection_dim=16)
    return LlavaForConditionalGeneration(LlavaConfig(text_config=LlamaConfig(**TEXT), vision_config=vision))


def hyv3() -> PreTrainedModel:
    experts = {"moe_intermediate_size": 8, "num_experts": 2, "num_experts_per_tok": 1, "first_k_dense_replace": 1}
    return HYV3ForCausalLM(HYV3Config(**TEXT, **experts))


def hrm() -> PreTrainedModel:
    return HrmTextForCausalLM(HrmTextConfig(**TEXT))


# What is saved, the class that it is loaded into, and a module whose name differs there.
CASES = {
    "llama4, its text": (llama4, AutoModelForCausalLM, "model.layers.0.self_attn.q_proj"),
    "qwen3.5, its text": (qwen3_5, AutoModelForCausalLM, "model.layers.0.self_attn.q_proj"),
    "llava": (llava, LlavaForConditionalGeneration, "model.language_model.layers.0.self_attn.q_proj"),
    "without its head": (tiny_llama, AutoModel, "layers.0.self_attn.q_proj"),
    "hyv3, shared experts": (hyv3, AutoModelForCausalLM, "model.layers.1.mlp.shared_experts.up_proj"),
    "hrm, split on load": (hrm, AutoModelForCausalLM, "model.H_module.layers.0.self_attn.q_proj"),
    "hrm, without its head": (hrm, AutoModel, "H_module.layers.0.self_attn.q_proj"),
}


def linear(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: module.weight for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def assert_holds(checkpoint, weights: dict[str, torch.Tensor]) -> None:
    for name, weight in weights.items():
        assert torch.equal(checkpoint.weight(name), weight), name
        assert checkpoint.shape(name) == tuple(weight.shape), name


@pytest.mark.parametrize("by", ["the class in training", "the folder's own class"])
@pytest.mark.parametrize("case", CASES)
def test_every_weight_is_the_one_that_transformers_loads(case, by, tmp_path, caplog):
    make, auto, differs = CASES[case]
    torch.manual_seed(0)
    make().save_pretrained(tmp_path)
    model = auto.from_pretrained(tmp_path)
    weights = linear(model)
    assert differs in weights
    assert differs not in open_checkpoint(tmp_path).names()
    with caplog.at_level(logging.WARNING):
        found = open_checkpoint(tmp_path).require(weights, Layout.of(model) if "training" in by else None)
    assert_holds(found, weights)
    assert ("loaded through transformers" in caplog.text) == ("hrm" in case)  # the others are told by names


def test_a_folder_without_the_head_serves_a_model_that_has_one(tmp_path):
    tiny_llama().model.save_pretrained(tmp_path)
    model = tiny_llama()
    weights = {name: weight for name, weight in linear(model).items() if name != "lm_head"}
    for trained in (Layout.of(model), None):
        assert_holds(open_checkpoint(tmp_path).require(weights, trained), weights)
        with pytest.raises(ValueError, match="expected a weight for the module 'lm_head'"):
            open_checkpoint(tmp_path).require(["lm_head"], trained)


def test_a_model_in_memory_is_asked_under_other_names_too(tmp_path):
    base = tiny_llama()
    for held, trained in ((base, base.model), (base.model, base)):
        weights = {name: weight for name, weight in linear(trained).items() if name != "lm_head"}
        assert_holds(open_checkpoint(held).require(weights, Layout.of(trained)), weights)


class Holder(nn.Module):
    def __init__(self, **inside: nn.Module) -> None:
        super().__init__()
        for name, module in inside.items():
            self.add_module(name, module)


@pytest.mark.parametrize("folder_holds", ["the model with its head", "the model", "the same holder, in memory"])
def test_the_transformer_may_sit_in_a_bigger_module(folder_holds, tmp_path):
    base, aligned = tiny_llama(), align(tiny_llama())
    source = Holder(network=base.model)
    if "memory" not in folder_holds:
        (base if "head" in folder_holds else base.model).save_pretrained(tmp_path)
        source = tmp_path
    subspace = SafetySubspace.estimate(source, Holder(network=aligned.model), ["q_proj"], rank=2, progress=False)
    expected = SafetySubspace.estimate(base, aligned, ["q_proj"], rank=2, progress=False)
    assert list(subspace) == [f"network.{name.removeprefix('model.')}" for name in expected]
    for ours, its in zip(subspace.values(), expected.values(), strict=True):
        # The start of the iteration depends on names, small matrices are decomposed exactly.
        assert torch.equal(ours.U, its.U)
        assert torch.equal(ours.V, its.V)


def test_without_targets_the_modules_that_both_have_are_found_under_both_names(tmp_path):
    base, aligned = tiny_llama(), align(tiny_llama())
    base.save_pretrained(tmp_path)
    subspace = SafetySubspace.estimate(tmp_path, aligned.model, rank=2, progress=False)
    assert {"embed_tokens", *(name for name in linear(aligned.model))} == set(subspace)


def test_two_towers_of_one_kind_are_an_error_that_names_both(tmp_path):
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    config = BertConfig(**sizes, num_hidden_layers=1)
    torch.manual_seed(0)
    pair = EncoderDecoderConfig.from_encoder_decoder_configs(config, BertConfig(**sizes, num_hidden_layers=1))
    EncoderDecoderModel(pair).save_pretrained(tmp_path)
    name = "encoder.layer.0.attention.self.query"
    for trained in (Layout.of(BertModel(config)), None):
        with pytest.raises(
            ValueError, match=rf"'{name}'.*'decoder\.bert\.{name}' or 'encoder\.{name}'.*Save the model"
        ):
            open_checkpoint(tmp_path).require([name], trained)


def test_a_tower_whose_weights_are_not_there_makes_no_room_for_the_other(tmp_path):
    config = BertConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=1
    )
    torch.manual_seed(0)
    both = EncoderDecoderModel(
        encoder=BertModel(config), decoder=BertModel(config)
    )  # transformers expects a head there
    both.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"expected one weight for the module.*'decoder\.bert\..* or 'encoder\."):
        open_checkpoint(tmp_path).require(["encoder.layer.0.attention.self.query"])


def test_a_weight_that_is_split_on_load_is_no_module_by_its_name(tmp_path):
    torch.manual_seed(0)
    hrm().save_pretrained(tmp_path)
    name, keys = "model.H_module.layers.0.self_attn.gate_proj", open_checkpoint(tmp_path).names()
    found = Layout.of(HrmTextForCausalLM.from_pretrained(tmp_path)).stored([name, "lm_head"], keys)
    assert found == {name: set(), "lm_head": {"lm_head"}}


def test_a_model_of_another_kind_is_no_match_although_names_and_shapes_are_alike(tmp_path):
    torch.manual_seed(0)
    llava().save_pretrained(tmp_path)
    names = ["encoder.layers.0.self_attn.q_proj"]  # CLIP's; 16 × 16 as Llama's are
    trained = LlamaModel(LlamaConfig(**TEXT))
    assert len(open_checkpoint(tmp_path).require(names).names()) > 0
    with pytest.raises(ValueError, match=r"expected a weight for the module 'encoder\.layers\.0\.self_attn\.q_proj'"):
        open_checkpoint(tmp_path).require(names, Layout.of(trained))


def test_asking_through_a_class_moves_no_random_numbers(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path).model
    before = torch.get_rng_state()
    open_checkpoint(tmp_path).require(linear(model), Layout.of(model))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("family", ["hunyuan_vl", "step3p7"])
def test_a_tower_takes_no_weight_of_the_text_model_for_its_own(family, tmp_path):
    """Both have layers of one name, and here of one shape; only the whole model's class tells them apart."""
    config = tiny_config(family)
    for part in (config.text_config, config.vision_config):
        for name in ("num_key_value_heads", "num_attention_groups"):
            if hasattr(part, name):
                setattr(part, name, part.num_attention_heads)
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    weights = linear(model)
    assert len({tuple(w.shape) for name, w in weights.items() if name.endswith("layers.0.self_attn.k_proj")}) == 1
    assert_holds(open_checkpoint(tmp_path).require(weights, Layout.of(model)), weights)
