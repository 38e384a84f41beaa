"""One pass says what generating says: against transformers' own ``generate``, prompt by prompt and without padding."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM, PreTrainedModel

from csulora_callback.models.adapters import find_adapter
from csulora_callback.models.checksum import checksum, weights_besides
from csulora_callback.models.teacher_forcing import batches_of, greedy_answers
from tests.helpers.lab import TARGETS, tiny_llama, with_lora
from tests.helpers.vision import Pictures, qwen

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [3, 4, 5], [15, 16], *([3 + i, 4, 5 + i] for i in range(6))]


def gpt2() -> GPT2LMHeadModel:
    """Positions are learned, and weights stored transposed."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=1, initializer_range=0.5))


def mamba() -> MambaForCausalLM:
    """Its state is no cache of keys and values."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "initializer_range": 0.5}
    return MambaForCausalLM(MambaConfig(**sizes, bos_token_id=0, eos_token_id=1, pad_token_id=2))


MODELS = {
    "llama": (lambda: tiny_llama(initializer_range=0.5), TARGETS),
    "gpt2": (gpt2, ["c_attn", "c_fc"]),
    "mamba": (mamba, ["in_proj", "x_proj"]),
}


def lora(name: str):
    make, targets = MODELS[name]
    model = with_lora(make(), target_modules=targets, init_lora_weights=False, lora_dropout=0.2)
    return model.train()


def generated(model: PreTrainedModel, prompt: list[int], tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    said = model.eval().generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=2,
    )
    return said[0, len(prompt) :].tolist()


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("error:.*cache.*:FutureWarning")
def test_answers_are_those_that_generating_greedily_gives(name, padding):
    model = lora(name)
    model.generation_config.repetition_penalty = 3.0  # of a checkpoint's config, which greedy says nothing of
    answers = greedy_answers(model, PROMPTS, 5, padding=padding)
    assert model.training
    model.generation_config.repetition_penalty = None
    assert answers == [generated(model, prompt, 5) for prompt in PROMPTS]
    assert len({tuple(answer) for answer in answers}) > 2


def test_an_answer_ends_with_its_first_end():
    model = lora("llama")
    whole = [generated(model, prompt, 6) for prompt in PROMPTS]
    ends = [whole[0][2], whole[3][0]]
    model.generation_config.eos_token_id = ends
    answers = greedy_answers(model, PROMPTS, 6)
    assert answers == [generated(model, prompt, 6) for prompt in PROMPTS]
    assert len(answers[0]) <= 3
    assert len(answers[3]) == 1


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_padded_pass_says_what_each_text_says_alone(name):
    model = lora(name)
    adapter, starts = find_adapter(model), [1, 1, 2, 0, 1, *([2] * 6)]
    read = {
        place: said
        for batch in batches_of(PROMPTS, starts)
        for place, said in zip(batch.places, batch.read(adapter), strict=True)
    }
    assert model.training
    assert sorted(read) == [place for place in range(len(PROMPTS)) if place != 1]  # of one token nothing is predicted
    model.eval()
    for place, said in read.items():
        ids, start = torch.tensor([PROMPTS[place]]), max(starts[place], 1)
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, start - 1 : -1]
        assert said.tokens.tolist() == PROMPTS[place][start:]
        torch.testing.assert_close(said.logits, logits, rtol=1e-4, atol=1e-5)
        by_hand = logits.double().log_softmax(-1)[range(len(said.tokens)), said.tokens]
        torch.testing.assert_close(said.log_likelihood.double(), by_hand, rtol=1e-4, atol=1e-5)


def test_no_batch_is_larger_than_is_good_for_its_logits():
    rows = [[5] * length for length in range(2, 400, 3)]
    batches = batches_of(rows, [1] * len(rows))
    assert sorted(place for batch in batches for place in batch.places) == list(range(len(rows)))
    assert max(len(batch.rows) * max(map(len, batch.rows)) for batch in batches) <= 1024
    assert len(batches) < len(rows)
    assert [batch.places for batch in batches_of([[5] * 3000], [1])] == [[0]]  # one alone is read, however long


def test_with_padding_few_batches_are_answered_and_none_is_large():
    model, sizes = lora("llama"), []
    model.register_forward_pre_hook(lambda _, args, kwargs: sizes.append(kwargs["input_ids"].shape), with_kwargs=True)
    greedy_answers(model, [[5] * (1 + place % 20) for place in range(40)], 1, padding=True)
    assert [rows for rows, _ in sizes] == [32, 8]
    sizes.clear()
    greedy_answers(model, [[5] * length for length in (3000, 2000, 1000, 900)], 1, padding=True)
    assert sizes == [(2, 1000), (1, 2000), (1, 3000)]


def test_reading_changes_nothing_of_the_model():
    model = lora("llama")
    model.get_base_model().lm_head.eval()  # not all modules are in one mode
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    for padding in (False, True):
        greedy_answers(model, PROMPTS, 3, padding=padding)
    for batch in batches_of(PROMPTS, [1] * len(PROMPTS)):
        batch.read(find_adapter(model))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("rslora", [False, True])
def test_without_the_adapter_it_is_the_model_below(rslora):
    model = with_lora(tiny_llama(), init_lora_weights=False, use_rslora=rslora)
    adapter, ids = find_adapter(model), torch.tensor([PROMPTS[2]])
    scalings = [layer.scaling for layer in adapter.layers.values()]
    with torch.no_grad():
        raw = model(input_ids=ids).logits
        with adapter.off():
            off = model(input_ids=ids).logits
        assert torch.equal(off, tiny_llama()(input_ids=ids).logits)
        assert torch.equal(raw, model(input_ids=ids).logits)
    assert not torch.equal(off, raw)
    assert [layer.scaling for layer in adapter.layers.values()] == scalings
    with pytest.raises(ZeroDivisionError), adapter.off():
        raise ZeroDivisionError
    assert [layer.scaling for layer in adapter.layers.values()] == scalings


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.bool])
def test_a_checksum_tells_weights_apart(dtype):
    weights = torch.arange(30).reshape(5, 6).fmod(2 if dtype == torch.bool else 30).to(dtype)
    same = checksum({"a": weights, "b": weights[:1]})
    assert checksum({"a": weights.clone(), "b": weights[:1]}) == same
    for place in range(30):
        other = weights.clone()
        other.flatten()[place] = 1 - other.flatten()[place].to(torch.int)
        assert checksum({"a": other, "b": weights[:1]}) != same
    swapped = weights[:, [1, 0, 2, 3, 4, 5]]
    for others in ({"b": weights, "a": weights[:1]}, {"a": weights.T, "b": weights[:1]}, {"a": swapped}):
        assert checksum(others) != same


def test_the_checksum_of_a_model_is_that_of_what_lies_under_its_adapter():
    checksums = []
    for seed in (1, 2):
        model = with_lora(tiny_llama(), seed=seed, init_lora_weights=False)
        adapter = find_adapter(model)
        checksums.append(checksum(weights_besides(model, [p for p in model.parameters() if p.requires_grad])))
        assert len(adapter.layers) == 6
    assert checksums[0] == checksums[1]
    model.get_base_model().model.norm.weight.data[0] += 1e-3  # no adapted module's
    assert checksum(weights_besides(model, [p for p in model.parameters() if p.requires_grad])) != checksums[0]


def test_images_that_a_model_read_before_do_not_move_what_it_answers():
    """M-RoPE's shift by the last batch's images is remembered in the model, and would be used for the next text."""
    model, prompts = qwen().eval(), [[3 + place, 5, 6, 4 + place] for place in range(8)]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter *= 20 if "language_model.layers" in name and parameter.ndim == 2 else 1  # so that places matter
    expected = greedy_answers(model, prompts, 6)
    pictures = Pictures([3], "qwen")
    batch = pictures.collate(list(pictures))
    loss = model(**batch).loss
    moved = model.model.rope_deltas.clone()
    assert moved.abs().max() > 0
    assert greedy_answers(model, prompts, 6) == expected
    assert torch.equal(model.model.rope_deltas, moved)
    assert torch.equal(model(**batch).loss, loss)
