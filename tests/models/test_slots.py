"""Where PEFT keeps factors: found by the keys of its files, taken apart and put together again without loss."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn

from csulora_callback.models.adapters import find_adapter
from csulora_callback.models.factors import digest, equal, from_peft_state_dict, to_peft_state_dict
from csulora_callback.models.slots import BiasSlot, EmbeddingSlot, Slot, join_all, slots_in, split_all
from tests.helpers.lab import tiny_gpt2, tiny_llama, with_biases, with_lora

KINDS = {"linear": Slot.of_linear, "embedding": EmbeddingSlot.of, "bias": BiasSlot.of}
PARTS = st.sampled_from(["q_proj", "lora_A", "embed_tokens", "bias_free", "0", "mlp"])


@st.composite
def adapters(draw):
    """Slots of modules with names of their own, and tensors for them."""
    names = draw(st.lists(st.lists(PARTS, min_size=1, max_size=3).map(".".join), min_size=1, max_size=6, unique=True))
    dtype, slots, tensors = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64])), [], []
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    for name in names:
        slot = KINDS[draw(st.sampled_from(sorted(KINDS)))](name)
        sizes = ((3,),) if isinstance(slot, BiasSlot) else ((2, 5), (3, 2))
        slots.append(slot)
        tensors += [torch.randn(size, generator=generator).to(dtype) for size in sizes]
    return slots, tensors


@settings(max_examples=50, deadline=None)
@given(adapters(), st.integers(0, 1000))
def test_what_is_split_is_joined_again_and_found_by_its_keys(adapter, seed):
    slots, tensors = adapter
    factors = split_all(slots, tensors)
    assert all(A.shape[0] == B.shape[1] for A, B in factors.values())
    assert all(A.dtype == B.dtype == tensors[0].dtype for A, B in factors.values())
    assert all(map(torch.equal, join_all(slots, factors), tensors))
    state = to_peft_state_dict(factors, slots)
    keys = list(state)
    random.Random(seed).shuffle(keys)
    assert set(slots_in([*keys, "base_model.model.lm_head.weight"])) == set(slots)
    assert equal(from_peft_state_dict(state, list(factors), "file"), factors)
    assert digest(from_peft_state_dict(state, list(factors), "file")) == digest(factors)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("build", "lora"),
    [
        (tiny_llama, {"target_modules": ["embed_tokens", "q_proj"]}),
        (tiny_gpt2, {"target_modules": ["wte", "wpe", "c_attn"]}),
        (with_biases, {"lora_bias": True}),
    ],
)
def test_slots_have_the_keys_of_pefts_files_and_its_values(build, lora):
    model = with_lora(build(), init_lora_weights=False, **lora)
    adapter = find_adapter(model)
    pefts = get_peft_model_state_dict(model, save_embedding_layers=False)
    ours = to_peft_state_dict(adapter.read(), adapter.slots)
    assert ours.keys() == pefts.keys()
    assert all(torch.equal(ours[key], pefts[key]) for key in pefts)
    changed = {name: (A * 1, B + 1) for name, (A, B) in adapter.read().items()}
    adapter.write(changed)
    assert equal(adapter.read(), changed)


def test_an_embeddings_update_is_that_which_peft_merges():
    model = get_peft_model(nn.Sequential(nn.Embedding(7, 4)), LoraConfig(r=2, target_modules=["0"], use_rslora=True))
    model.base_model.model[0].lora_embedding_A["default"].data.normal_()
    adapter = find_adapter(model)
    (layer,), ((A, B),) = adapter.layers.values(), adapter.read().values()
    delta = model.base_model.model[0].get_delta_weight("default")
    torch.testing.assert_close(layer.scaling * B @ A, delta.T)
    assert (layer.shape, layer.stored_transposed) == ((4, 2, 7), True)


@pytest.mark.parametrize("lora", [{"lora_bias": True}, {"target_modules": ["embed_tokens", "q_proj"]}])
@pytest.mark.filterwarnings("ignore")
def test_without_the_adapter_the_model_is_the_one_under_it(lora):
    plain, ids = with_biases().eval(), torch.arange(3, 9)[None]
    with torch.no_grad():
        expected = plain(ids).logits
        model = with_lora(plain, init_lora_weights=False, **lora).eval()
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.data.normal_()
        assert not torch.equal(model(ids).logits, expected)
        with find_adapter(model).off():
            assert torch.equal(model(ids).logits, expected)
