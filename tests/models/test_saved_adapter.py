"""Scalings and orientations of an adapter on disk are those of the live model, by PEFT's own rules."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from csulora_callback.models.adapters import find_adapter
from csulora_callback.models.factors import equal
from csulora_callback.models.ranks import options_for_ranks, scaling_of
from csulora_callback.models.saved_adapter import SavedAdapter
from tests.helpers.lab import tiny_llama, with_biases, with_lora

PATTERNS = {
    "plain": {},
    "rank-stabilized": {"use_rslora": True},
    "ranks": {"rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 6}},
    "alphas": {"alpha_pattern": {"layers.0.mlp.down_proj": 5, "self_attn.q_proj": 3}},
    "expressions": {
        "rank_pattern": {r".*\.0\..*_proj": 2, "^model.layers.1.self_attn.[qv]_proj": 3},
        "alpha_pattern": {r"layers\.\d+\.self_attn\.(q|v)_proj": 1, "^down_proj": 7},
    },
    "all": {"use_rslora": True, "rank_pattern": {"v_proj": 7}, "alpha_pattern": {"v_proj": 1.5, "q_proj": 0}},
}


@pytest.mark.parametrize("case", PATTERNS)
def test_scalings_and_factors_are_the_live_ones(tmp_path, case):
    with_lora(tiny_llama(), init_lora_weights=False, **PATTERNS[case]).save_pretrained(tmp_path)
    adapter = find_adapter(PeftModel.from_pretrained(tiny_llama(), tmp_path))
    found = SavedAdapter.read(tmp_path)
    assert found.scalings == {name: layer.scaling for name, layer in adapter.layers.items()}
    assert equal(found.factors, adapter.read())
    layers = found.layers(found.stored_transposed({}))
    for name, layer in adapter.layers.items():
        assert (layers[name].shape, layers[name].scaling) == (layer.shape, layer.scaling)
        assert layers[name].stored_transposed is layer.stored_transposed is False


class Blocks(nn.Module):
    """Modules whose names are the beginnings and ends of each other's."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(8, 8), "mlp_q": nn.Linear(8, 8)}) for _ in range(12))

    def forward(self, x):
        return x


NAMES = [name for name, module in Blocks().named_modules() if isinstance(module, nn.Linear)]


@settings(max_examples=25, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 8), min_size=len(NAMES), max_size=len(NAMES)),
    scalings=st.lists(st.sampled_from([0.1, 1.0, 2.0, 1 / 3]), min_size=len(NAMES), max_size=len(NAMES)),
    use_rslora=st.booleans(),
)
def test_any_ranks_and_scalings_can_be_said_in_a_config(ranks, scalings, use_rslora):
    ranks, scalings = dict(zip(NAMES, ranks, strict=True)), dict(zip(NAMES, scalings, strict=True))
    options = json.loads(json.dumps(options_for_ranks(ranks, scalings, use_rslora)))
    model = get_peft_model(Blocks(), LoraConfig(target_modules=["q", "mlp_q"], use_rslora=use_rslora, **options))
    for name, layer in find_adapter(model).layers.items():
        assert layer.shape[1] == ranks[name]
        assert layer.scaling == pytest.approx(scalings[name], rel=1e-15)


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(**sizes, tie_word_embeddings=False))


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize(
    "target_modules",
    [["c_attn"], ["c_attn", "c_proj"], r".*attn\.c_proj", ["c_attn", "lm_head"]],
    ids=["long", "long and square", "square", "of both kinds"],
)
def test_the_orientation_of_a_conv1d_is_told_by_shapes_and_by_what_peft_wrote(tmp_path, target_modules):
    model = with_lora(gpt2(), target_modules=target_modules, init_lora_weights=False)
    model.save_pretrained(tmp_path)
    live = find_adapter(model).layers
    stored = {name: tuple(layer.module.get_base_layer().weight.shape) for name, layer in live.items()}
    told = SavedAdapter.read(tmp_path).stored_transposed(stored)
    assert told == {name: layer.stored_transposed for name, layer in live.items()}
    assert any(told.values())


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_a_square_module_beside_both_kinds_is_refused(tmp_path):
    model = with_lora(gpt2(), target_modules=["c_attn", "c_proj", "lm_head"])
    model.save_pretrained(tmp_path)
    layers = find_adapter(model).layers
    stored = {name: tuple(layer.module.get_base_layer().weight.shape) for name, layer in layers.items()}
    with pytest.raises(ValueError, match=r"module 'transformer.h.0.attn.c_proj' is square.*SafetyCorrector"):
        SavedAdapter.read(tmp_path).stored_transposed(stored)


@pytest.mark.filterwarnings("ignore")
def test_a_square_embedding_is_told_by_its_keys(tmp_path):
    """Its weight is stored transposed, beside square layers that are not."""
    model = with_lora(tiny_llama(hidden_size=32), target_modules=["embed_tokens", "q_proj"])
    model.save_pretrained(tmp_path)
    stored = dict.fromkeys(find_adapter(model).layers, (32, 32))
    told = SavedAdapter.read(tmp_path).stored_transposed(stored)
    assert [name for name, transposed in told.items() if transposed] == ["model.embed_tokens"]


@pytest.mark.parametrize("says", [True, False])
def test_biases_are_there_if_and_only_if_the_config_says_so(tmp_path, says):
    with_lora(with_biases(), lora_bias=not says).save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_bias": says}))
    with pytest.raises(
        ValueError, match=f"expected {'a' if says else 'no'} bias of lora_B for module 'model.layers.0"
    ):
        SavedAdapter.read(tmp_path)


@pytest.mark.parametrize(
    ("options", "finite"),
    [
        ({"r": 0}, False),
        ({"r": None}, False),
        ({"r": "8"}, False),
        ({"lora_alpha": math.nan}, False),
        ({"lora_alpha": None}, False),
        ({"r": -2, "use_rslora": True}, False),
        ({"lora_alpha": 0}, True),
        ({"rank_pattern": None, "alpha_pattern": None}, True),
    ],
)
def test_ranks_and_alphas_that_are_none_are_refused(options, finite):
    config = LoraConfig(r=4, lora_alpha=8)
    for name, value in options.items():
        setattr(config, name, value)
    if finite:
        scaling_of(config, "q_proj")
    else:
        with pytest.raises(ValueError, match="`adapter`: expected a rank ≥ 1 and a finite lora_alpha for module"):
            scaling_of(config, "q_proj")
