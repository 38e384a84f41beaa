"""The data-aware correction of an embedding is that of token vectors, which are one-hot there."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from csulora_callback import Penalty, correct
from csulora_callback.method.one_hot import OneHotGain, OneHotSystem, input_gains_of, input_systems
from csulora_callback.method.token_space import input_gain

TOKENS = st.lists(st.integers(0, 6), max_size=20)


def one_hot(ids: list[int]) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(ids, dtype=torch.long), 7).double()


def counts(ids: list[int]) -> torch.Tensor:
    return one_hot(ids).sum(dim=0).float()


@settings(max_examples=100, deadline=None)
@given(TOKENS, TOKENS, st.sampled_from([0.0, 0.1, 4.0, 1000.0]), st.sampled_from([0.01, 0.1, 2.0]))
def test_counts_say_the_same_as_one_hot_vectors(task, probes, strength, ridge):
    A = torch.randn(3, 7, generator=torch.Generator().manual_seed(0)).double()
    expected = input_gain(one_hot(task), one_hot(probes), strength, ridge)(A)
    systems = input_systems({"embed": counts(task)}, {"embed": counts(probes)}, ridge)
    found = input_gains_of(systems, strength)["embed"](A)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
    unread = [i for i in range(7) if i not in probes]
    assert torch.equal(found[:, unread], A[:, unread])


def test_both_kinds_side_by_side_and_counts_that_float32_holds():
    task, probes = torch.tensor([3e7, 1.0, 0.0]), torch.tensor([1.0, 1.0, 1.0])
    systems = input_systems({"embed": task}, {"embed": probes, "q_proj": torch.eye(3)})
    gains = input_gains_of(systems, 2.0)
    assert set(gains) == {"embed", "q_proj"}
    assert isinstance(gains["embed"], OneHotGain)
    kept = gains["embed"](torch.ones(1, 3).bfloat16())
    assert kept.dtype == torch.bfloat16
    assert kept[0, 0] > 0.5 > kept[0, 1] >= kept[0, 2]


def test_correct_takes_it_and_checks_its_size():
    A, B, U, V = torch.ones(1, 3), torch.ones(4, 1), torch.eye(4)[:, :1], torch.eye(3)[:, :1]
    gain = OneHotGain(OneHotSystem.of(None, torch.tensor([1.0, 0.0, 0.0]), 0.1), 1.0)
    done = correct(A, B, U, V, Penalty.data_aware(1.0), input_gain=gain)
    torch.testing.assert_close(
        done.lora_A, torch.tensor([[0.25, 1.0, 1.0]])
    )  # 1 / (1 + 3): all of d_in is one token's
    assert torch.equal(done.lora_B, B)
    with pytest.raises(ValueError, match="`input_gain`: expected one of 2 inputs, d_in of `lora_A`, but got 3"):
        correct(A[:, :2], B, U, V[:2], Penalty.data_aware(1.0), input_gain=gain)
