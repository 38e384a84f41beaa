"""The correction against references written from its definition, in dense float64, and its properties."""

import math
import pickle
import re

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from csulora_callback import Penalty, correct
from tests.helpers.updates import (
    ANY,
    BLOCKS,
    DOUBLE,
    FINITE,
    Update,
    allowance,
    make_update,
    multipliers,
    penalty_of,
    presets,
    projectors,
    reference,
    updates,
)

CASES = settings(derandomize=True, deadline=None, max_examples=200)


@CASES
@given(updates(), presets())
@example(make_update(16, 96, 8, 5, 12), ("csulora", (10.0,)))  # grouped-query attention
@example(make_update(4, 48, 16, 2, 20, scaling=-2.0), ("csulora", (10.0,)))  # r > d_out
@example(make_update(1, 1, 1, 1, 1), ("guard", (3.0,)))
def test_result_agrees_with_dense_projectors(update, preset):
    (energy, rho, lambdas, closest), delta, r = reference(update, preset), update.delta, len(update.A)
    size, defined = delta.norm().item(), closest.norm() > 1e-6 * delta.norm()
    for rank in ("truncate", "expand"):
        result = update.correct(preset, rank)
        X, new_r = update.of(result), len(result.lora_A)
        assert result.lora_B.shape[1] == new_r
        assert new_r <= max(r, min(2 * r, *delta.shape)) if rank == "expand" else new_r == r
        tail = 0.0 if rank == "expand" else torch.linalg.svdvals(closest)[r:].norm().item()
        assert (X - closest).norm().item() <= tail + allowance(closest, delta)
        if defined:
            assert result.truncation_error == pytest.approx(tail / closest.norm().item(), abs=1e-6)
        if rank == "expand" or preset[0] in ("separable", "guard", "projection"):  # gains of rank one: exact at rank r
            assert result.truncation_error == 0.0
            assert (X - closest).norm().item() <= allowance(closest, delta)
        assert result.update_norm == pytest.approx(size, rel=1e-6)
        assert result.closest_norm == pytest.approx(closest.norm().item(), rel=1e-6, abs=1e-6 * size)
        assert result.corrected_norm == pytest.approx(X.norm().item(), rel=1e-6, abs=1e-6 * size)
        assert result.relative_change == pytest.approx((X - delta).norm().item() / (size or 1.0), abs=1e-6)
        assert tuple(result.energy) == tuple(result.relative_energy) == tuple(result.gain) == BLOCKS
        assert list(result.energy.values()) == pytest.approx(energy, rel=1e-6, abs=1e-12 * size**2)
        assert list(result.relative_energy.values()) == pytest.approx(rho, abs=1e-6)
        assert sum(result.energy.values()) == pytest.approx(size**2, rel=1e-6)
        assert sum(result.relative_energy.values()) == pytest.approx(1.0 if size else 0.0)
        for gain, multiplier, share in zip(result.gain.values(), lambdas, rho, strict=True):
            assert 0.0 <= gain <= 1.0
            # An infinite strength on a share that is zero up to rounding gives either limit: nothing is there.
            assert share < 1e-12 or gain == pytest.approx(1 / (1 + multiplier), abs=1e-6)


@CASES
@given(updates((torch.float32, torch.float64), largest=10), presets(FINITE))
@example(make_update(3, 24, 2, 1, 7), ("csulora", (10.0,)))
def test_closest_update_solves_the_least_squares_problem(update, preset):
    """``argmin ‖X − Δ‖² + Σ λ_b ‖Π_b X‖²`` over ``vec X``: ``√λ_b Π_b`` stacked under the identity, no gains."""
    preset = ("table", (0.0, 1e6, 1e6, 1e6)) if preset[0] == "projection" else preset  # least squares needs λ < ∞
    delta, lambdas = update.delta, reference(update, preset).lambdas
    operators = [torch.kron(left, right.T.contiguous()) for left, right in projectors(update)]
    penalized = [math.sqrt(x) * operator for x, operator in zip(lambdas, operators, strict=True)]
    rows = torch.cat([torch.eye(delta.numel(), dtype=torch.float64), *penalized])
    target = torch.cat([delta.flatten(), delta.new_zeros(len(rows) - delta.numel())])
    solution = torch.linalg.lstsq(rows, target[:, None], driver="gelsd").solution.view_as(delta)
    X = update.of(update.correct(preset, "expand"))
    assert (X - solution).norm().item() <= allowance(solution, delta)


@CASES
@given(updates(DOUBLE), presets(FINITE))
def test_gradient_of_the_objective_vanishes_at_the_closest_update(update, preset):
    preset = ("table", (0.0, 1e6, 1e6, 1e6)) if preset[0] == "projection" else preset
    delta, lambdas = update.delta, reference(update, preset).lambdas
    X = update.of(update.correct(preset, "expand")).requires_grad_()
    blocks = zip(lambdas, projectors(update), strict=True)
    loss = (X - delta).square().sum() + sum(x * (left @ X @ right).square().sum() for x, (left, right) in blocks)
    (gradient,) = torch.autograd.grad(loss, X)
    assert gradient.norm() <= 1e-12 * (1 + max(lambdas)) * delta.norm()


@CASES
@given(updates(DOUBLE), presets(), st.integers(0, 1000))
def test_result_does_not_depend_on_the_gauge(update, preset, seed):
    delta, closest, r = update.delta, reference(update, preset).closest, len(update.A)
    noise = torch.randn(2, r, r, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    left, right = torch.linalg.qr(noise)[0]
    G = left @ (torch.logspace(-1, 2, r, dtype=torch.float64)[:, None] * right)
    other = update._replace(A=torch.linalg.solve(G, update.A), B=update.B @ G)
    sigma = torch.linalg.svdvals(closest)
    unique = len(sigma) <= r or sigma[r - 1] - sigma[r] > 1e-3 * sigma[0]  # ties at the cut leave a choice
    for rank in ("expand", "truncate"):
        here, there = update.correct(preset, rank), other.correct(preset, rank)
        if rank == "expand" or unique:
            assert (update.of(there) - update.of(here)).norm() <= 1e-9 * delta.norm()
        assert there.energy == pytest.approx(here.energy, rel=1e-9, abs=1e-12 * delta.norm().item() ** 2)
        assert there.relative_energy == pytest.approx(here.relative_energy, abs=1e-9)
        assert there.relative_change == pytest.approx(here.relative_change, abs=1e-7)
        if closest.norm() > 1e-6 * delta.norm():
            assert there.truncation_error == pytest.approx(here.truncation_error, abs=1e-7)


@CASES
@given(updates(DOUBLE), presets(), st.integers(0, 1000))
def test_truncate_is_beaten_by_no_other_matrix_of_its_rank(update, preset, seed):
    """Eckart–Young: the error is the tail of the singular values; random factors and ALS do not get below it."""
    closest, size, r = reference(update, preset).closest, update.delta.norm().item(), len(update.A)
    result = update.correct(preset)
    error = (update.of(result) - closest).norm().item()
    assert error == pytest.approx(torch.linalg.svdvals(closest)[r:].norm().item(), abs=1e-9 * size)
    noise = torch.randn(update.B.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for B in (noise, result.lora_B + 0.1 * noise):
        for _ in range(5):  # alternating least squares: the best A for B, then the best B for A
            A = torch.linalg.pinv(B) @ closest
            assert (B @ A - closest).norm().item() >= error - 1e-9 * size
            B = closest @ torch.linalg.pinv(A)


@CASES
@given(updates(), st.sampled_from(["csulora", "separable", "guard", "table"]), st.sampled_from(["truncate", "expand"]))
def test_strength_zero_changes_no_bit(update, name, rank):
    update.A[0, 0] = update.B[0, 0] = -0.0  # the sign of zero is a bit too
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        A, B = update.A.to(dtype), update.B.to(dtype)
        result = update._replace(A=A, B=B).correct((name, (0.0,)), rank)
        for new, old in ((result.lora_A, A), (result.lora_B, B)):
            assert torch.equal(new, old)
            assert torch.equal(new.signbit(), old.signbit())
        assert result.relative_change == result.truncation_error == 0.0


@CASES
@given(updates(DOUBLE), st.sampled_from([("projection", ()), ("guard", (math.inf,))]))
def test_hard_limits_are_idempotent(update, preset):
    once = update.correct(preset)
    twice = update._replace(A=once.lora_A, B=once.lora_B).correct(preset)
    assert (update.of(twice) - update.of(once)).norm() <= 1e-12 * update.delta.norm()


@CASES
@given(updates(DOUBLE), st.floats(0.5, 50.0), st.integers(0, 1000))
def test_truncated_factors_are_the_closest_to_the_old_ones(update, strength, seed):
    result, r = update.correct(("csulora", (strength,))), len(update.A)
    A, B, old_A, old_B = result.lora_A, result.lora_B, update.A, update.B
    size = (A.norm() * old_A.norm() + B.norm() * old_B.norm()).item()
    assert (A.norm() * old_B.norm()).item() == pytest.approx((B.norm() * old_A.norm()).item(), rel=1e-9)
    if result.truncation_error > 1e-6:  # written anew: every singular value is shared like the norm
        assert (B.T @ B / B.norm() ** 2 - A @ A.T / A.norm() ** 2).norm() <= 1e-9
    overlap = B.T @ old_B + A @ old_A.T  # Procrustes: no rotation helps if and only if this is symmetric and ≥ 0
    assert (overlap - overlap.T).norm().item() <= 1e-9 * size
    assert torch.linalg.eigvalsh(overlap).min().item() >= -1e-9 * size
    distance = (A - old_A).square().sum() + (B - old_B).square().sum()
    noise = torch.randn(r, r, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for R in (torch.linalg.qr(noise)[0], torch.matrix_exp(0.01 * (noise - noise.T)), -torch.eye(r).double()):
        rotated = (R.T @ A - old_A).square().sum() + (B @ R - old_B).square().sum()
        assert distance <= rotated + 1e-9 * size


ALL = [("csulora", (3.0,)), ("csulora", (math.inf,)), ("separable", (3.0,)), ("separable", (math.inf,))]
ALL += [("guard", (3.0,)), ("guard", (math.inf,)), ("projection", ()), ("table", (1.0, 0.0, math.inf, 2.0))]


@pytest.mark.parametrize("preset", ALL)
@pytest.mark.parametrize("rank", ["truncate", "expand"])
@pytest.mark.parametrize("zero", ["A", "B", "scaling"])
def test_an_update_of_zero_stays_zero(zero, rank, preset):
    update = make_update(5, 6, 2, 2, 3)
    update = update._replace(**{zero: getattr(update, zero) * 0})
    result = update.correct(preset, rank)
    assert torch.equal(update.of(result), torch.zeros(5, 6).double())
    assert torch.cat([result.lora_A.flatten(), result.lora_B.flatten()]).isfinite().all()
    assert {*result.energy.values(), *result.relative_energy.values()} == {0.0}
    assert all(0.0 <= gain <= 1.0 for gain in result.gain.values())
    assert result.relative_change == result.truncation_error == 0.0
    assert result.update_norm == result.closest_norm == result.corrected_norm == 0.0


@pytest.mark.parametrize("table", [(math.inf,) * 4, (math.inf, 0.0, 0.0, 0.0)])  # gains of rank 0 and 2
def test_a_closest_update_of_zero_is_finite(table):
    update = make_update(5, 6, 2, 5, 6)._replace(U=torch.eye(5), V=torch.eye(6))  # all of it is aligned
    result = update.correct(("table", table))
    assert torch.equal(update.of(result), torch.zeros(5, 6).double())
    assert (result.relative_change, result.truncation_error, result.corrected_norm) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize("rank", ["truncate", "expand"])
@pytest.mark.parametrize("preset", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes_are_kept_and_only_the_last_cast_rounds(dtype, preset, rank):
    update = make_update(10, 12, 3, 3, 4, scaling=2.0, dtypes=(dtype, torch.float32))
    inputs, state = [tensor.clone() for tensor in update[:4]], torch.get_rng_state()
    for tensor in update[:4]:
        tensor.requires_grad_()
    result = update.correct(preset, rank)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before) for tensor, before in zip(update[:4], inputs, strict=True))
    exact = Update(inputs[0].double(), inputs[1].double(), *inputs[2:], 2.0)
    wide, closest = exact.correct(preset, rank), reference(exact, preset).closest
    for new, expected in ((result.lora_A, wide.lora_A), (result.lora_B, wide.lora_B)):
        assert (new.dtype, new.requires_grad) == (dtype, False)
        assert torch.equal(new, expected.to(dtype))
    tail = torch.linalg.svdvals(closest)[len(result.lora_A) :].norm()
    assert (update.of(result) - closest).norm() <= tail + max(2 * torch.finfo(dtype).eps, 1e-13) * closest.norm()


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = result if isinstance(result, (tuple, list)) else (result,)
        self.numel = max(self.numel, *(t.numel() for t in tensors if isinstance(t, Tensor)), 0)
        return result


@pytest.mark.parametrize(("preset", "rank"), [(ALL[0], "truncate"), (ALL[0], "expand"), (ALL[4], "truncate")])
def test_no_matrix_of_the_models_size_is_formed(preset, rank):
    d, r, k = 3000, 4, 8
    basis = torch.linalg.qr(torch.randn(d, k))[0]
    update = Update(torch.randn(r, d), torch.randn(d, r), basis, basis)
    with LargestTensor() as seen:
        update.correct(preset, rank)
    assert d * k <= seen.numel <= 4 * d * (r + k)


@CASES
@given(st.lists(st.floats(0, 1), min_size=4, max_size=4), presets(st.one_of(ANY, st.floats(0, 1e300))))
@example([0.25] * 4, ("guard", (1e200,)))  # beyond the largest float is infinity, not an error
def test_gains_are_those_of_the_table_and_lie_between_zero_and_one(rho, preset):
    gains = penalty_of(preset).gain(dict(zip(BLOCKS, rho, strict=True)))
    assert tuple(gains) == BLOCKS
    assert all(0.0 <= gain <= 1.0 for gain in gains.values())
    assert list(gains.values()) == pytest.approx([1 / (1 + x) for x in multipliers(preset, rho)], rel=1e-12, abs=0)


def test_penalties_are_values():
    assert Penalty.guard(3) == Penalty.guard(3.0) != Penalty.guard(4)
    assert Penalty.guard(3) != Penalty.csulora(3)
    assert repr(Penalty.guard(3)) == "Penalty(name='guard', parameters={'strength': 3.0})"
    assert repr(Penalty.projection()) == "Penalty(name='projection', parameters={})"
    for penalty in map(penalty_of, ALL):
        copy, shares = pickle.loads(pickle.dumps(penalty)), dict.fromkeys(BLOCKS, 0.25)
        assert (copy, repr(copy), copy.gain(shares)) == (penalty, repr(penalty), penalty.gain(shares))
    as_json = {"name": "table", "aligned": 0.0, "output": 0.0, "input": 0.0, "off": "inf"}
    assert Penalty.table(off=math.inf).to_json() == as_json


@pytest.mark.parametrize("value", [-1.0, -math.inf, math.nan, True, False, "3", None])
@pytest.mark.parametrize("argument", ["csulora", "separable", "guard", *BLOCKS])
def test_a_multiplier_that_is_no_size_is_refused(argument, value):
    name = argument if argument in BLOCKS else "strength"
    message = f"`{name}`: expected a number ≥ 0 (math.inf is allowed), but got {value!r}."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Penalty.table(**{name: value}) if argument in BLOCKS else getattr(Penalty, argument)(value)


GOOD = {"lora_A": torch.ones(2, 6), "lora_B": torch.ones(5, 2), "U": torch.eye(5)[:, :2], "V": torch.eye(6)[:, :2]}
AXES = {"lora_A": "(r, d_in)", "lora_B": "(d_out, r)", "U": "(d_out, k)", "V": "(d_in, k)"}
REFUSED = [
    *(({n: GOOD[n][0]}, f"`{n}`: expected a matrix {AXES[n]}, but got shape {(GOOD[n].shape[1],)}.") for n in GOOD),
    *(({n: GOOD[n][None]}, f"`{n}`: expected a matrix {AXES[n]}, but got shape {(1, *GOOD[n].shape)}.") for n in GOOD),
    *(({n: GOOD[n].long()}, f"`{n}`: expected a floating-point matrix, but got torch.int64.") for n in GOOD),
    *(({n: GOOD[n] + math.nan}, f"`{n}`: expected finite values, but got NaN or Inf.") for n in GOOD),
    *(({n: GOOD[n] - math.inf}, f"`{n}`: expected finite values, but got NaN or Inf.") for n in GOOD),
    ({"lora_B": torch.ones(5, 3)}, "`lora_B`: expected 2 columns, the rank r of `lora_A`, but got shape (5, 3)."),
    ({"U": torch.eye(4)}, "`U`: expected 5 rows, d_out of `lora_B`, but got shape (4, 4)."),
    ({"V": torch.eye(5)}, "`V`: expected 6 rows, d_in of `lora_A`, but got shape (5, 5)."),
    ({"scaling": math.nan}, "`scaling`: expected a finite number, but got nan."),
    ({"scaling": math.inf}, "`scaling`: expected a finite number, but got inf."),
    ({"penalty": None}, "`penalty`: expected a Penalty such as Penalty.guard(3.0), but got None."),
    ({"rank": "shrink"}, "`rank`: expected 'truncate' or 'expand', but got 'shrink'."),
]


@pytest.mark.parametrize(("changed", "message"), REFUSED)
def test_arguments_that_do_not_fit_are_refused(changed, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        correct(**{**GOOD, "penalty": Penalty.guard(1), **changed})


def test_an_update_of_zero_comes_back_in_memory_of_its_own():
    good = {name: tensor.double() for name, tensor in GOOD.items()} | {"lora_B": torch.zeros(5, 2).double()}
    result = correct(**good, penalty=Penalty.guard(3))
    result.lora_A.zero_()
    result.lora_B.fill_(1.0)
    assert torch.equal(good["lora_A"], GOOD["lora_A"].double())
    assert not good["lora_B"].any()


def test_penalties_can_be_keys():
    assert {Penalty.guard(3): 1}[Penalty.guard(3.0)] == 1
