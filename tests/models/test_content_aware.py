"""A content-aware penalty: the prefix that all probes share has no say, against dense second moments and own hooks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from csulora_callback import Penalty
from csulora_callback.method.one_hot import input_gains_of, input_systems
from csulora_callback.models.activations import Activations, Texts, vectors_of
from csulora_callback.models.adapters import find_adapter
from csulora_callback.models.reading import shared_prefix
from tests.helpers.content_aware import by_hand, inputs_of, moment
from tests.helpers.lab import VOCABULARY, tiny_llama, with_lora

START = 2  # all probes begin with 0, 3
PROBES = [[0, 3, 5, 6, 7], [0, 3, 9], [0, 3, 4, 11, 12, 13]]
TASK = [[14, 15, 3], [0, 16, 17, 18, 19]]
TEXTS = Texts(TASK, PROBES, len(TASK))
STRENGTH = 4.0


def adapter_on(targets, **lora):
    model = with_lora(tiny_llama(), target_modules=targets, init_lora_weights=False, lora_dropout=0.2, **lora)
    return find_adapter(model.train())


def corrected(adapter, activations) -> dict[str, torch.Tensor]:
    """Of each module, ``A`` after the correction."""
    gains = input_gains_of(input_systems(activations.task, activations.probes), STRENGTH)
    return {name: gains[name](lora_A) for name, (lora_A, _) in adapter.read().items()}


rows = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=5), min_size=1, max_size=4)


@given(rows)
def test_the_shared_prefix_is_the_common_one_and_leaves_a_token_of_each(prompts):
    shortest = min(map(len, prompts))
    common = max(n for n in range(6) if len({tuple(prompt[:n]) for prompt in prompts}) == 1 and n <= shortest)
    assert shared_prefix(prompts) == min(common, shortest - 1)


def test_a_prefix_that_is_a_whole_prompt_leaves_its_last_token():
    assert shared_prefix([[0, 3, 4], [0, 3], [0, 3, 5]]) == 1
    assert shared_prefix([[0, 3]]) == 1
    assert shared_prefix([[0, 3], []]) == 0


def test_the_correction_is_the_dense_formula_without_the_prefix():
    adapter = adapter_on(["q_proj", "k_proj", "up_proj", "down_proj"])
    activations = Activations.read(adapter, TEXTS, skip_prefix=True)
    query, key = (f"model.layers.1.self_attn.{kind}_proj" for kind in "qk")
    assert activations.probes[query] is activations.probes[key]
    expected, whole = (by_hand(adapter.model, TEXTS, start, STRENGTH) for start in (START, 0))
    for name, found in corrected(adapter, activations).items():
        assert (found - expected[name]).norm() < 1.5e-2 * expected[name].norm(), name  # vectors are bfloat16
        assert (whole[name] - expected[name]).norm() > 0.05 * expected[name].norm(), name


def test_of_the_task_all_tokens_count():
    adapter = adapter_on(["q_proj", "down_proj"])
    skipping, whole = (Activations.read(adapter, TEXTS, skip) for skip in (True, False))
    for name, own in vectors_of(adapter, TASK).items():
        assert torch.equal(own, skipping.task[name])
        assert torch.equal(own, whole.task[name])
    for name, own in vectors_of(adapter, PROBES).items():
        assert torch.equal(own, whole.probes[name])


def test_held_back_probes_share_the_prefix_and_are_not_read():
    adapter, shorter = adapter_on(["q_proj"]), [0, 8, 9]
    activations = Activations.read(adapter, Texts(TASK, [*PROBES, shorter], 2, held_back=[3]), skip_prefix=True)
    assert {len(own) for own in activations.probes.values()} == {sum(len(row) - 1 for row in PROBES)}


def test_of_a_probe_that_is_the_prefix_its_last_token_is_drawn():
    adapter, short = adapter_on(["q_proj"]), [[0, 3], *PROBES]
    activations = Activations.read(adapter, Texts(TASK, short, 2), skip_prefix=True)
    name = "model.layers.1.self_attn.q_proj"
    expected = inputs_of(adapter.model, short, 1)[name]
    assert len(activations.probes[name]) == sum(len(row) - 1 for row in short)
    assert moment(activations.probes[name]).allclose(moment(expected), rtol=2e-2, atol=2e-2)


def test_of_an_embedding_tokens_after_the_prefix_are_counted():
    adapter = adapter_on(["embed_tokens", "q_proj"])
    activations, name = Activations.read(adapter, TEXTS, skip_prefix=True), "model.embed_tokens"
    task, probes = (
        torch.bincount(torch.tensor([token for row in rows for token in row[start:]]), minlength=VOCABULARY).double()
        for rows, start in ((TASK, 0), (PROBES, START))
    )
    C_T = (VOCABULARY * task / task.sum() + 0.1) / 1.1
    gains = C_T / (C_T + STRENGTH * VOCABULARY * probes / probes.sum())
    lora_A = adapter.read()[name][0]
    torch.testing.assert_close(corrected(adapter, activations)[name].double(), lora_A.double() * gains)
    assert gains[3] == 1.0  # of the prefix, which is in no count of the probes


def test_of_a_bounded_sample_all_is_drawn_after_the_prefix():
    adapter = adapter_on(["q_proj"])
    prompts = [[0, 3, i, i + 1] for i in range(4, 30, 2)]  # no token twice but the prefix's
    name = "model.layers.0.self_attn.q_proj"
    whole = vectors_of(adapter, prompts, 1000)[name]
    some = vectors_of(adapter, prompts, 9, start=START)[name]
    prefixes = {tuple(own.tolist()) for row in range(len(prompts)) for own in whole[4 * row : 4 * row + 2]}
    drawn = {tuple(own.tolist()) for own in some}
    assert len(some) == len(drawn) == 9
    assert not drawn & prefixes
    assert drawn < {tuple(own.tolist()) for own in whole}


def test_the_penalty_says_which_it_is():
    aware, content = Penalty.data_aware(4.0), Penalty.content_aware(4.0)
    assert (aware.skips_prefix, content.skips_prefix) == (False, True)
    assert aware.on_probes == content.on_probes == 4.0
    assert content.to_json() == {"name": "content_aware", "strength": 4.0}
    assert str(Penalty.content_aware()) == "content_aware (strength 300)"
    with pytest.raises(
        ValueError, match=r"`strength`: expected at most 1e\+06 for a data-aware penalty, but got 2000000"
    ):
        Penalty.content_aware(2e6)
