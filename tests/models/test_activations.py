"""Token vectors against the hidden states that transformers itself returns."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from csulora_callback.models.activations import Activations, Texts, vectors_of
from csulora_callback.models.adapters import find_adapter
from csulora_callback.models.training_batches import TrainedBatch
from csulora_callback.models.training_rows import ROWS, TrainingRows
from tests.helpers.lab import VOCABULARY, tiny_llama, with_lora

ROWS_OF_IDS = [[5, 6, 7, 8], [9, 10], [11, 12, 13], *([3 + i, 4 + i] for i in range(8))]  # more than one batch
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "gate_proj", "down_proj"]


def model_with_lora(**lora):
    model = with_lora(tiny_llama(), target_modules=TARGETS, init_lora_weights=False, lora_dropout=0.2, **lora)
    return model.train()


def by_hand(model, rows):
    """Inputs of the first layer's queries and of the second one's ``up_proj``, row by row without padding."""
    queries, up = [], []
    layers = model.get_base_model().model.layers
    for row in rows:
        states = []
        handle = layers[1].post_attention_layernorm.register_forward_hook(lambda *a, into=states: into.append(a[2]))
        with torch.no_grad():
            hidden = model(input_ids=torch.tensor([row]), output_hidden_states=True).hidden_states
        handle.remove()
        queries.append(layers[0].input_layernorm(hidden[0])[0])
        up.append(states[0][0])
    return torch.cat(queries), torch.cat(up)


def test_vectors_are_the_modules_inputs_without_padding():
    model = model_with_lora()
    vectors = vectors_of(find_adapter(model), ROWS_OF_IDS)
    queries, up = by_hand(model.eval(), sorted(ROWS_OF_IDS, key=len))
    got = vectors["model.layers.0.self_attn.q_proj"], vectors["model.layers.1.mlp.up_proj"]
    for mine, expected in zip(got, (queries, up), strict=True):
        assert mine.dtype == torch.bfloat16
        torch.testing.assert_close(mine.float(), expected, rtol=1e-2, atol=1e-3)


def test_modules_with_one_input_share_its_vectors_and_others_do_not():
    vectors = vectors_of(find_adapter(model_with_lora()), ROWS_OF_IDS)
    layer = "model.layers.0"
    assert vectors[f"{layer}.self_attn.q_proj"] is vectors[f"{layer}.self_attn.v_proj"]
    assert vectors[f"{layer}.mlp.gate_proj"] is vectors[f"{layer}.mlp.up_proj"]
    assert len({id(kept) for kept in vectors.values()}) == 2 * 3  # attention, MLP, and the MLP's end, in two layers


def test_a_sample_is_bounded_the_same_each_time_and_in_the_same_places_everywhere():
    adapter, rows = find_adapter(model_with_lora()), [list(range(i, i + 3)) for i in range(3, 30, 3)]  # no token twice
    whole, some, again = (vectors_of(adapter, rows, tokens) for tokens in (1000, 7, 7))
    for name, kept in some.items():
        assert len(kept) == 7
        assert torch.equal(kept, again[name])
    places = {
        tuple(next(i for i, row in enumerate(whole[name]) if torch.equal(row, kept)) for kept in some[name])
        for name in some
    }
    assert len(places) == 1


def test_the_model_and_every_random_generator_are_left_as_they_were():
    model = model_with_lora()
    model.get_base_model().lm_head.eval()  # not all modules are in one mode
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
    vectors_of(find_adapter(model), ROWS_OF_IDS)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == hooks
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_failing_pass_leaves_no_hook_and_the_old_mode():
    model = model_with_lora()
    with pytest.raises(IndexError):
        vectors_of(find_adapter(model), [[VOCABULARY + 1]])
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_module_that_reads_nothing_is_refused():
    base = tiny_llama()
    base.model.aside = nn.Linear(16, 16)
    adapter = find_adapter(with_lora(base, target_modules=["q_proj", "aside"]))
    with pytest.raises(ValueError, match=r"module 'model.aside': expected to see its input.*ran without calling it"):
        vectors_of(adapter, ROWS_OF_IDS)


def test_a_module_that_reads_only_some_tokens_is_refused():
    base = tiny_llama()
    base.model.norm.register_forward_hook(lambda module, args, output: output[:, -1:])
    adapter = find_adapter(with_lora(base, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match=r"module 'lm_head': expected one vector for each token.*but got 11"):
        vectors_of(adapter, ROWS_OF_IDS)


def test_a_model_with_an_encoder_is_refused():
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    adapter = find_adapter(with_lora(model, target_modules=["q"], task_type="SEQ_2_SEQ_LM"))
    with pytest.raises(ValueError, match=r"^`penalty`: expected a decoder-only language model.* has an encoder"):
        vectors_of(adapter, ROWS_OF_IDS)


def test_activations_are_of_task_and_probes():
    adapter = find_adapter(model_with_lora())
    texts = Texts(task=ROWS_OF_IDS[:2], probes=ROWS_OF_IDS[2:], seen=9)
    activations, name = Activations.read(adapter, texts), "model.layers.0.mlp.down_proj"
    assert torch.equal(activations.task[name], vectors_of(adapter, texts.task)[name])
    assert torch.equal(activations.probes[name], vectors_of(adapter, texts.probes)[name])
    assert Activations.read(adapter, Texts([], texts.probes, 0)).task == {}  # before the first step


def offered(count: int, batch: int = 4) -> TrainingRows:
    sample, ids = TrainingRows(), torch.arange(count)
    for part in ids.split(batch):
        sample.offer(batch_of(part[:, None]))
    return sample


def batch_of(ids, mask=None):
    return TrainedBatch(ids, {"attention_mask": mask}, LlamaConfig())


def test_the_sample_of_rows_is_bounded_and_the_same_for_the_same_rows():
    assert offered(10).rows == [[i] for i in range(10)]
    sample = offered(1000)
    assert (len(sample.rows), sample.seen) == (ROWS, 1000)
    assert sample == offered(1000)
    later = TrainingRows(list(map(list, offered(400).rows)), seen=400)  # as a checkpoint holds it
    for part in torch.arange(400, 1000).split(4):
        later.offer(batch_of(part[:, None]))
    assert later == sample


@pytest.mark.parametrize("batch", [1, 2, 5, 16, 64])
def test_the_sample_of_rows_is_uniform(batch):
    """Each fifth of the stream is kept about equally often: a chi-square test at one in a thousand."""
    kept = [0] * 5
    for (row,) in offered(5000, batch).rows:
        kept[row // 1000] += 1
    assert sum((count - ROWS / 5) ** 2 / (ROWS / 5) for count in kept) < 18.5, kept


def test_padding_on_either_side_is_left_out_and_long_rows_are_cut():
    sample = TrainingRows()
    sample.offer(batch_of(torch.tensor([[5, 6, 0], [0, 7, 8]]), torch.tensor([[1, 1, 0], [0, 1, 1]])))
    sample.offer(batch_of(torch.arange(5000)[None], torch.ones(1, 1, 1, 5000)))  # a mask of another kind says nothing
    assert sample.rows == [[5, 6], [7, 8], list(range(512))]
