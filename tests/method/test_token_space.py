"""The data-aware closest safe update against the dense formula in float64."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from csulora_callback import Penalty, correct
from csulora_callback.method.token_space import MAX_STRENGTH, input_gain


def second_moments(tokens: torch.Tensor) -> torch.Tensor:
    C = tokens.double().T @ tokens.double()
    return C * (len(C) / C.trace()) if C.trace() > 0 else C


def by_hand(A: torch.Tensor, task: torch.Tensor, probes: torch.Tensor, strength: float, ridge: float) -> torch.Tensor:
    """``A C_T (C_T + λ C_H)⁻¹`` with dense matrices."""
    identity = torch.eye(A.shape[1], dtype=torch.float64)
    C_T = (second_moments(task) + ridge * identity) / (1.0 + ridge) if len(task) else identity
    return A.double() @ C_T @ torch.linalg.inv(C_T + strength * second_moments(probes))


def tokens(count: int, d_in: int, seed: int, decay: float = 3.0) -> torch.Tensor:
    """Vectors whose spectrum falls by ``decay`` orders of magnitude, as activations' does."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(d_in, d_in, generator=generator))[0]
    return torch.randn(count, d_in, generator=generator) * torch.logspace(0, -decay, d_in) @ basis


@given(
    d_in=st.integers(1, 24),
    counts=st.tuples(st.integers(0, 40), st.integers(1, 40)),
    strength=st.floats(1e-3, 1e4),
    ridge=st.sampled_from([1e-3, 1e-1, 1.0]),
    decay=st.floats(0.0, 4.0),
    seed=st.integers(0, 100),
)
@settings(deadline=None, max_examples=200)
def test_it_is_the_dense_formula(d_in, counts, strength, ridge, decay, seed):
    task, probes = (tokens(count, d_in, seed + i, decay) for i, count in enumerate(counts))
    A = torch.randn(3, d_in, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    got, expected = input_gain(task, probes, strength, ridge)(A), by_hand(A, task, probes, strength, ridge)
    assert (got - expected).norm() <= 1e-5 * A.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_at_the_size_of_a_small_model(dtype):
    task, probes = (tokens(512, 576, seed).to(dtype) for seed in (0, 1))
    A = torch.randn(8, 576, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = by_hand(A, task, probes, 10.0, 0.1)
    assert (input_gain(task, probes, 10.0, 0.1)(A) - expected).norm() <= 1e-5 * expected.norm()


def test_the_closest_safe_update_is_a_minimum():
    task, probes, A = tokens(20, 8, 0), tokens(20, 8, 1), torch.randn(2, 8, dtype=torch.float64)
    C_T = (second_moments(task) + 0.1 * torch.eye(8)) / 1.1
    X = input_gain(task, probes, 5.0, 0.1)(A).requires_grad_()
    change = X - A
    objective = (change @ C_T * change).sum() + 5.0 * (X @ second_moments(probes) * X).sum()
    (gradient,) = torch.autograd.grad(objective, X)
    assert gradient.abs().max() < 1e-5


def test_scale_of_the_tokens_and_order_do_not_matter():
    task, probes, A = tokens(20, 8, 0), tokens(30, 8, 1), torch.randn(2, 8, dtype=torch.float64)
    expected = input_gain(task, probes, 3.0)(A)
    torch.testing.assert_close(input_gain(7.0 * task, probes.flip(0) / 3.0, 3.0)(A), expected, rtol=1e-5, atol=1e-6)


def test_no_strength_and_probes_of_nothing_leave_the_update_alone():
    task, A = tokens(20, 8, 0), torch.randn(2, 8, dtype=torch.float64)
    assert torch.equal(input_gain(task, tokens(20, 8, 1), 0.0)(A), A)
    assert torch.equal(input_gain(task, torch.zeros(4, 8), 5.0)(A), A)
    assert torch.equal(input_gain(task, torch.empty(0, 8), 5.0)(A), A)


def test_probes_that_are_all_alike_are_no_trouble_at_the_largest_strength():
    """The beginnings of all prompts are the chat template's: the same vectors over and over."""
    task, probes = tokens(512, 64, 0), tokens(4, 64, 1).repeat(128, 1)
    A = torch.randn(2, 64, dtype=torch.float64)
    got, expected = input_gain(task, probes, MAX_STRENGTH)(A), by_hand(A, task, probes, MAX_STRENGTH, 0.1)
    assert (got - expected).norm() <= 1e-5 * A.norm()


def test_what_only_the_probes_excite_goes_and_what_only_the_task_excites_stays():
    task, probes = torch.eye(4)[:2], torch.eye(4)[2:3]
    A = torch.ones(1, 4, dtype=torch.float64)
    expected = torch.tensor([[1.0, 1.0, 0.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(input_gain(task, probes, 1e6)(A), expected, rtol=0, atol=1e-5)


@given(ridge=st.floats(1e-2, 1e4), seed=st.integers(0, 50))
@settings(deadline=None, max_examples=50)
def test_a_larger_ridge_bounds_the_change(ridge, seed):
    """In the limit the map is a contraction: the change is less than the update."""
    task, probes = tokens(12, 16, seed), tokens(12, 16, seed + 1)
    A = torch.randn(3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    identity = torch.eye(16, dtype=torch.float64)
    C_T = (second_moments(task) + ridge * identity) / (1.0 + ridge)
    change = (input_gain(task, probes, 10.0, ridge)(A) - A).norm() / A.norm()
    bound = torch.linalg.cond(C_T).sqrt()  # (I + λ C_T⁻½ C_H C_T⁻½)⁻¹ is a contraction between C_T^½ and C_T^-½
    assert change <= bound + 1e-6


def test_correct_applies_it_to_the_input_side_and_says_what_it_did():
    generator = torch.Generator().manual_seed(0)
    A, B = (torch.randn(*shape, generator=generator) for shape in ((3, 8), (6, 3)))
    U, V = torch.linalg.qr(torch.randn(6, 2, generator=generator))[0], torch.eye(8)[:, :2]
    task, probes = tokens(20, 8, 0), tokens(20, 8, 1)
    gain = input_gain(task, probes, 5.0)
    done = correct(A, B, U, V, Penalty.data_aware(5.0), scaling=2.0, input_gain=gain)
    delta, X = 2.0 * B.double() @ A.double(), 2.0 * done.lora_B.double() @ done.lora_A.double()
    torch.testing.assert_close(X, by_hand(delta, task, probes, 5.0, 0.1), rtol=1e-5, atol=1e-5)
    assert torch.equal(done.lora_B, B)  # only the input side changes
    assert done.relative_change == pytest.approx(((X - delta).norm() / delta.norm()).item(), rel=1e-5)
    assert done.update_norm == pytest.approx(delta.norm().item())
    assert done.corrected_norm == pytest.approx(X.norm().item(), rel=1e-5)
    assert done.truncation_error == 0.0


BAD = {
    "strength": ({"strength": -1.0}, "`strength`: expected a number from 0 to 1e+06, but got -1.0"),
    "no end": ({"strength": math.inf}, "`strength`: expected a number from 0 to 1e+06, but got inf"),
    "ridge": ({"ridge": 0.0}, "`ridge`: expected a finite number > 0, but got 0.0"),
    "shape": ({"task": torch.ones(3)}, "`task`: expected token vectors"),
    "kind": ({"probes": torch.ones(3, 4, dtype=torch.long)}, "`probes`: expected token vectors"),
    "width": ({"probes": torch.ones(3, 5)}, "`probes`: expected vectors of d_in = 4"),
    "not finite": ({"probes": torch.full((3, 4), math.nan)}, "`probes`: expected finite values"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case):
    changed, message = BAD[case]
    arguments = {"task": torch.ones(3, 4), "probes": torch.ones(3, 4), "strength": 1.0, "ridge": 0.1, **changed}
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        input_gain(**arguments)


def test_correct_wants_a_gain_for_a_data_aware_penalty_and_for_no_other():
    A, B, basis = torch.ones(1, 4), torch.ones(4, 1), torch.eye(4)[:, :2]
    gain = input_gain(torch.ones(1, 4), torch.ones(1, 4), 1.0)
    with pytest.raises(ValueError, match="`input_gain`: expected one for the penalty data_aware"):
        correct(A, B, basis, basis, Penalty.data_aware(1.0))
    with pytest.raises(ValueError, match="`input_gain`: expected none for the penalty guard"):
        correct(A, B, basis, basis, Penalty.guard(1.0), input_gain=gain)
    with pytest.raises(ValueError, match="`input_gain`: expected one of 4 inputs"):
        correct(
            A, B, basis, basis, Penalty.data_aware(1.0), input_gain=input_gain(torch.ones(1, 3), torch.ones(1, 3), 1.0)
        )


def test_the_penalty():
    assert str(Penalty.data_aware(3)) == "data_aware (strength 3)"
    assert Penalty.data_aware(3).to_json() == {"name": "data_aware", "strength": 3.0}
    with pytest.raises(ValueError, match=r"`strength`: expected at most 1e\+06 for a data-aware penalty"):
        Penalty.data_aware(math.inf)
    with pytest.raises(ValueError, match="`strength`: expected a number ≥ 0"):
        Penalty.data_aware(-1.0)
