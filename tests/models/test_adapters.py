"""Which layers are found, that their factors are PEFT's, and that what cannot be corrected is named."""

import re

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from csulora_callback.models.adapters import find_adapter
from csulora_callback.models.factors import digest, equal, from_peft_state_dict, to_peft_state_dict
from tests.helpers.lab import tiny_llama, with_lora


def delta_by_peft(layer) -> torch.Tensor:
    """PEFT's own update, as it would be merged, in the orientation (d_out, d_in)."""
    delta = layer.module.get_delta_weight(layer.adapter)
    return delta.T if layer.stored_transposed else delta


def assert_factors_are_pefts(model: nn.Module) -> None:
    adapter = find_adapter(model)
    assert adapter.layers
    for name, (lora_A, lora_B) in adapter.read().items():
        layer = adapter.layers[name]
        torch.testing.assert_close(layer.scaling * lora_B @ lora_A, delta_by_peft(layer))


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": r".*\.(q_proj|up_proj)"},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "k_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3}},
        {"target_modules": ["o_proj"], "use_rslora": True},
        {"target_modules": ["k_proj"], "r": 32},  # r exceeds both sides of the matrix
    ],
    ids=lambda lora: next(reversed(lora)),
)
def test_factors_and_scaling_are_those_that_peft_merges(lora):
    assert_factors_are_pefts(with_lora(tiny_llama(), init_lora_weights=False, **lora))


def test_conv1d_is_read_in_the_orientation_of_its_factors():
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=8, n_layer=1, n_head=2, n_positions=16))
    model = with_lora(gpt2, target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True)
    assert_factors_are_pefts(model)
    (layer,) = find_adapter(model).layers.values()
    assert layer.stored_transposed
    assert layer.lora_B.shape[0] == 24


def test_names_are_those_of_the_model_without_peft():
    plain = {name for name, _ in tiny_llama().named_modules()}
    assert set(find_adapter(with_lora(tiny_llama())).layers) <= plain
    added = tiny_llama()
    added = inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), added)
    assert set(find_adapter(added).layers) == {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}
    assert set(find_adapter(torch.compile(with_lora(tiny_llama()))).layers) <= plain


def test_the_active_trainable_adapter_is_found_whatever_its_name():
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="first")
    model.add_adapter("second", LoraConfig(r=3, target_modules=["v_proj"]))
    assert find_adapter(model).name == "first"
    model.set_adapter("second")
    adapter = find_adapter(model)
    assert adapter.name == "second"
    assert set(adapter.layers) == {f"model.layers.{i}.self_attn.v_proj" for i in (0, 1)}


def test_of_two_active_adapters_the_one_that_is_trained_is_found():
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="first")
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["first", "second"])
    for parameter in (p for name, p in model.named_parameters() if ".first." in name):
        parameter.requires_grad_(False)
    assert find_adapter(model).name == "second"


def test_an_adapter_loaded_for_inference_is_found():
    model = with_lora(tiny_llama())
    model.requires_grad_(False)
    assert find_adapter(model).name == "default"


def test_adapter_names_that_contain_one_another_are_kept_apart():
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="task")
    model.add_adapter("task_two", LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("task_two")
    assert find_adapter(model).name == "task_two"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_write_reads_back_in_place_and_in_the_parameters_dtype(dtype):
    model = with_lora(tiny_llama().to(dtype), init_lora_weights=False)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    adapter = find_adapter(model)
    parameters = {name: id(layer.lora_A) for name, layer in adapter.layers.items()}
    factors = {name: (A.float() * 2, B.float() * 3) for name, (A, B) in adapter.read().items()}
    adapter.write(factors)
    for name, (lora_A, lora_B) in adapter.read().items():
        assert lora_A.dtype == dtype
        torch.testing.assert_close(lora_A, factors[name][0].to(dtype))
        torch.testing.assert_close(lora_B, factors[name][1].to(dtype))
        assert id(adapter.layers[name].lora_A) == parameters[name]


def test_state_dict_is_pefts_and_comes_back():
    model = with_lora(tiny_llama(), init_lora_weights=False)
    adapter = find_adapter(model)
    ours, pefts = to_peft_state_dict(adapter.read()), get_peft_model_state_dict(model)
    assert ours.keys() == pefts.keys()
    assert all(torch.equal(ours[key], pefts[key]) for key in pefts)
    back = from_peft_state_dict(ours, list(adapter.layers), "file")
    assert digest(back) == digest(adapter.read())
    ours.popitem()
    with pytest.raises(ValueError, match=r"file: expected the LoRA factor 'base_model\.model\..*lora_B\.weight'"):
        from_peft_state_dict(ours, list(adapter.layers), "file")


def test_digest_sees_values_and_names_and_not_the_width_of_the_same_values():
    factors = {"a": (torch.randn(2, 3).bfloat16(), torch.randn(3, 2).bfloat16())}
    assert digest(factors) == digest({"a": tuple(tensor.float() for tensor in factors["a"])})
    assert digest(factors) != digest({"b": factors["a"]})
    assert digest(factors) != digest({"a": (factors["a"][0] + 1, factors["a"][1])})


def test_the_same_values_in_another_dtype_are_not_equal():
    factors = {"a": (torch.ones(2, 3), torch.ones(3, 2))}
    assert equal(factors, {"a": (torch.ones(2, 3), torch.ones(3, 2))})
    assert not equal(factors, {"a": (torch.ones(2, 3), torch.ones(3, 2).half())})


class WithHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = with_lora(tiny_llama())
        self.head = nn.Linear(16, 1)


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3)


def _unsupported_models():
    def lora(**settings):
        return lambda: with_lora(tiny_llama(), **settings)

    q = "model.layers.0.self_attn.q_proj"
    return {
        "dora": (lora(use_dora=True), f"module '{q}': DoRA"),
        "embedding with max_norm": (
            lambda: get_peft_model(nn.Sequential(nn.Embedding(4, 2, max_norm=1.0)), LoraConfig(target_modules=["0"])),
            "module '0': LoRA on an embedding with max_norm",
        ),
        "embedding tied to the output": (
            lambda: with_lora(
                tiny_llama(tie_word_embeddings=True), target_modules=["embed_tokens"], ensure_weight_tying=True
            ),
            "`model`: LoRA on an embedding with ensure_weight_tying=True is not supported",
        ),
        "convolution": (
            lambda: get_peft_model(Convolution(), LoraConfig(target_modules=["convolution"])),
            "module 'convolution': LoRA on Conv2d",
        ),
        "modules_to_save": (lora(modules_to_save=["model.norm"]), "module 'model.norm': modules_to_save"),
        "trained elsewhere": (WithHead, "module 'head.weight': a parameter trained outside the LoRA factors"),
        "bias": (lora(bias="all"), f"module '{q}.bias': a bias that is trained"),
        "pissa": (lora(init_lora_weights="pissa"), "`model`: LoRA with init_lora_weights='pissa'"),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", _unsupported_models())
def test_unsupported_kinds_are_named(kind):
    build, message = _unsupported_models()[kind]
    if kind == "bias":
        from transformers import Qwen2Config, Qwen2ForCausalLM

        sizes = tiny_llama().config
        config = Qwen2Config(
            vocab_size=32,
            hidden_size=sizes.hidden_size,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        model = with_lora(Qwen2ForCausalLM(config), bias="all")
    else:
        model = build()
    with pytest.raises(ValueError, match=re.escape(message)):
        find_adapter(model)


def test_other_tuners_merged_adapters_and_models_without_lora_are_refused():
    from peft import IA3Config

    ia3 = get_peft_model(tiny_llama(), IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="expected an adapter of LoraConfig, but got one of IA3Config"):
        find_adapter(ia3)
    with pytest.raises(ValueError, match="expected a model with LoRA layers, but found none"):
        find_adapter(tiny_llama())
    merged = with_lora(tiny_llama())
    merged.merge_adapter()
    with pytest.raises(ValueError, match="its adapter is merged"):
        find_adapter(merged)


def test_two_active_trainable_adapters_are_refused():
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="first")
    model.add_adapter("second", LoraConfig(r=3, target_modules=["q_proj"]))
    model.base_model.set_adapter(["first", "second"])
    with pytest.raises(ValueError, match=re.escape("got ['first', 'second']")):
        find_adapter(model)
