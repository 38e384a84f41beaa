"""Vectors read in batches, and no more than is needed, against whole texts read one by one in float64."""

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from csulora_callback.models import activations, listening
from csulora_callback.models.activations import vectors_of
from csulora_callback.models.adapters import find_adapter
from csulora_callback.models.training_rows import fixed_sample
from tests.helpers.lab import VOCABULARY, tiny_llama, with_lora

SIZES = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "initializer_range": 0.3}
LLAMA_LIKE = {**SIZES, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
GEMMA = {**LLAMA_LIKE, "head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
PROJECTIONS = ["q_proj", "v_proj", "o_proj", "down_proj"]


def gpt2() -> GPT2LMHeadModel:
    sizes = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.3))


MODELS = {  # how to make it, what is adapted, and whether it is known to be causal
    "llama": (lambda: tiny_llama(initializer_range=0.3, max_position_embeddings=64), PROJECTIONS, True),
    "adapted head": (lambda: tiny_llama(initializer_range=0.3), ["q_proj", "lm_head"], True),
    "sliding window": (lambda: MistralForCausalLM(MistralConfig(**LLAMA_LIKE, sliding_window=3)), PROJECTIONS, True),
    "gpt2": (gpt2, ["c_attn", "c_fc"], True),
    "state space": (lambda: MambaForCausalLM(MambaConfig(**SIZES, state_size=4)), ["in_proj", "x_proj"], False),
    "bidirectional": (
        lambda: Gemma3ForCausalLM(Gemma3TextConfig(**GEMMA, use_bidirectional_attention=True)),
        PROJECTIONS,
        False,
    ),
}


def texts(count: int = 24) -> list[list[int]]:
    """Of many lengths, up to 40 tokens."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 41, (count,), generator=generator).tolist()
    return [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def lora(name: str):
    make, targets, _ = MODELS[name]
    torch.manual_seed(0)
    return with_lora(make(), target_modules=targets, init_lora_weights=False, lora_dropout=0.2).double().train()


@torch.no_grad()
def one_by_one(model, rows) -> dict[str, torch.Tensor]:
    """What enters every adapted module, of whole texts without padding, in the order of their lengths."""
    seen, adapter = {}, find_adapter(model)
    hooks = [
        layer.module.register_forward_pre_hook(lambda _, args, own=name: seen.setdefault(own, []).append(args[0][0]))
        for name, layer in adapter.layers.items()
    ]
    model.eval()
    for row in sorted(rows, key=len):
        model(input_ids=torch.tensor([row]), use_cache=False)
    model.train()
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(vectors) for name, vectors in seen.items()}


@pytest.mark.parametrize("tokens", [20, 10_000])
@pytest.mark.parametrize("name", MODELS)
def test_the_sample_is_that_of_whole_texts_read_one_by_one(name, tokens):
    model, rows = lora(name), texts()
    expected, got = one_by_one(model, rows), vectors_of(find_adapter(model), rows, tokens)
    places = fixed_sample(sum(map(len, rows)), tokens)
    assert got.keys() == expected.keys()
    for module, vectors in got.items():
        torch.testing.assert_close(vectors.double(), expected[module][places], rtol=2**-8, atol=1e-9)


@pytest.fixture
def passes(request):
    """A model, and the shapes of ids and logits of each of its passes."""
    model, shapes = lora(request.param), []

    def look(module, args, kwargs, output):
        shapes.append((tuple(kwargs["input_ids"].shape), int(kwargs["attention_mask"].sum()), output.logits.shape[1]))

    model.get_base_model().register_forward_hook(look, with_kwargs=True)
    return model, shapes


@pytest.mark.parametrize("passes", MODELS, indirect=True)
def test_only_what_is_needed_is_read(passes, request):
    model, shapes = passes
    name = request.node.callspec.params["passes"]
    rows = texts()
    vectors_of(find_adapter(model), rows, tokens=20)
    ordered, drawn = sorted(rows, key=len), set(fixed_sample(sum(map(len, rows)), 20))
    start, needed = 0, []
    for row in ordered:
        own = [place - start for place in drawn if start <= place < start + len(row)]
        start += len(row)
        if own:
            needed.append(max(own) + 1 if MODELS[name][2] else len(row))
    assert len(needed) < len(rows)  # out of some texts nothing was drawn
    assert sum(tokens for _, tokens, _ in shapes) == sum(needed)
    if name == "adapted head":
        assert all(logits == length for (_, length), _, logits in shapes)
    else:
        assert {logits for *_, logits in shapes} == {1}


@pytest.mark.parametrize("passes", ["llama", "adapted head"], indirect=True)
def test_batches_are_of_about_one_length_and_bounded(passes, request, monkeypatch):
    model, shapes = passes
    monkeypatch.setattr(activations, "_BATCH_TOKENS", 64)
    monkeypatch.setattr(activations, "_BATCH_TOKENS_WITH_LOGITS", 64)
    rows = texts(60)
    vectors_of(find_adapter(model), rows)
    assert all(count * length <= 64 for (count, length), *_ in shapes)
    assert sum(count * length for (count, length), *_ in shapes) <= 1.1 * sum(map(len, rows))  # little padding
    assert len(shapes) < len(rows)


def test_it_does_not_matter_when_vectors_are_moved(monkeypatch):
    model = lora("llama")
    expected = vectors_of(find_adapter(model), texts(), 30)
    monkeypatch.setattr(listening, "_TRANSFER", 100)
    got = vectors_of(find_adapter(model), texts(), 30)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_of_a_module_that_is_called_twice_in_a_pass_both_inputs_are_kept(monkeypatch):
    monkeypatch.setattr(activations, "_BATCH_TOKENS", 64)
    model = with_lora(tiny_llama(max_position_embeddings=64), target_modules=["up_proj"], init_lora_weights=False)
    layers = model.get_base_model().model.layers
    layers[1] = layers[0]  # as models that share their layers
    adapter, rows = find_adapter(model), texts()
    (name,) = adapter.layers
    expected, places = one_by_one(model, rows)[name], fixed_sample(sum(map(len, rows)), 20)
    assert len(expected) == 2 * sum(map(len, rows))
    calls, start = [], 0
    for row in sorted(rows, key=len):
        calls.append(expected[start : start + 2 * len(row)].reshape(2, len(row), -1))
        start += 2 * len(row)
    calls = torch.cat(calls, 1)[:, places]
    got = vectors_of(adapter, rows, 20)[name]
    torch.testing.assert_close(got.float(), calls.reshape(40, -1), rtol=2**-7, atol=1e-5)


def test_a_module_that_some_pass_leaves_out_is_refused(monkeypatch):
    monkeypatch.setattr(activations, "_BATCH_TOKENS", 64)
    model, seen = with_lora(tiny_llama(max_position_embeddings=64), target_modules=["up_proj"]), []
    mlp = model.get_base_model().model.layers[1].mlp
    forward = mlp.forward

    def sometimes(hidden):
        seen.append(hidden)
        return hidden if len(seen) == 2 else forward(hidden)

    mlp.forward = sometimes
    with pytest.raises(ValueError, match=r"module 'model.layers.1.mlp.up_proj': expected one vector for each token"):
        vectors_of(find_adapter(model), texts())
