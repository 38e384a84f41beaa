"""The correction against references written from its definition, in dense float64, and its properties."""

import math
import pickle
import re

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from csulora_callback import Correction, Penalty, correct

CASES = settings(derandomize=True, deadline=None, max_examples=150)
STRENGTHS = st.one_of(st.sampled_from([0.0, math.inf]), st.floats(0.01, 100.0))
BLOCKS = ("aligned", "output", "input", "off")


def random_basis(dimension: int, k: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(dimension, dimension, generator=generator, dtype=torch.float64))[0][:, :k]


@st.composite
def updates(draw):
    """``(A, B, U, V, scaling)`` in float32, any shapes: subspaces from empty to full, ranks above the dimensions."""
    d_out, d_in, r = draw(st.integers(1, 20)), draw(st.integers(1, 20)), draw(st.integers(1, 24))
    k_out, k_in = draw(st.integers(0, d_out)), draw(st.integers(0, d_in))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    A, B = torch.randn(r, d_in, generator=generator), torch.randn(d_out, r, generator=generator)
    U, V = random_basis(d_out, k_out, generator).float(), random_basis(d_in, k_in, generator).float()
    return A, B, U, V, draw(st.sampled_from([1.0, 0.25, 16.0, -2.0]))


@st.composite
def penalties(draw):
    preset = draw(st.sampled_from(["csulora", "separable", "guard", "projection", "table"]))
    if preset == "projection":
        return Penalty.projection()
    if preset == "table":
        return Penalty.table(*(draw(STRENGTHS) for _ in range(4)))
    return getattr(Penalty, preset)(draw(STRENGTHS))


def dense(lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    return scaling * lora_B.double() @ lora_A.double()


def blocks_of(X: Tensor, U: Tensor, V: Tensor) -> dict[str, Tensor]:
    """The four blocks, from projectors."""
    U, V = U.double(), V.double()
    P_U, P_V = U @ U.T, V @ V.T
    Q_U, Q_V = torch.eye(len(U)) - P_U, torch.eye(len(V)) - P_V
    return {"aligned": P_U @ X @ P_V, "output": P_U @ X @ Q_V, "input": Q_U @ X @ P_V, "off": Q_U @ X @ Q_V}


def multipliers(penalty: Penalty, rho: dict[str, float]) -> dict[str, float]:
    """The table of λ, written again from its definition."""
    s = penalty.parameters.get("strength")

    def times(share: float) -> float:
        return 0.0 if share == 0 else s * share

    if penalty.name == "csulora":
        partial = times(rho["output"] + rho["input"])
        return {"aligned": 0.0, "output": partial, "input": partial, "off": times(rho["off"])}
    if penalty.name == "separable":
        output, input_ = times(rho["output"]), times(rho["input"])
        return {"aligned": 0.0, "output": output, "input": input_, "off": (1 + output) * (1 + input_) - 1}
    if penalty.name == "guard":
        return {"aligned": (1 + s) ** 2 - 1, "output": s, "input": s, "off": 0.0}
    if penalty.name == "projection":
        return {"aligned": 0.0, "output": math.inf, "input": math.inf, "off": math.inf}
    return penalty.parameters


def reference(A: Tensor, B: Tensor, U: Tensor, V: Tensor, scaling: float, penalty: Penalty) -> Tensor:
    """``X*`` in dense float64."""
    parts = blocks_of(dense(A, B, scaling), U, V)
    total = sum(part.square().sum() for part in parts.values()).item()
    rho = {block: part.square().sum().item() / total for block, part in parts.items()}
    return sum(part / (1 + multipliers(penalty, rho)[block]) for block, part in parts.items())


def assert_close(X: Tensor, expected: Tensor, update: Tensor, tolerance: float = 1e-5) -> None:
    """Relative to ``X*``. Below a thousandth of the update, what float32 bases can resolve is relative to that."""
    scale = max(expected.norm().item(), 1e-3 * update.norm().item())
    assert (X - expected).norm().item() <= tolerance * scale


def truncated(X: Tensor, rank: int) -> Tensor:
    left, sigma, right = torch.linalg.svd(X, full_matrices=False)
    return (left[:, :rank] * sigma[:rank]) @ right[:rank]


@CASES
@given(updates(), penalties())
def test_expand_is_the_dense_projector_reference(update, penalty):
    A, B, U, V, scaling = update
    result = correct(A, B, U, V, penalty, scaling, rank="expand")
    expected = reference(A, B, U, V, scaling, penalty)
    assert_close(dense(result.lora_A, result.lora_B, scaling), expected, dense(A, B, scaling))
    assert result.lora_A.shape[0] <= 2 * A.shape[0]
    assert result.truncation_error == 0.0


@CASES
@given(updates(), penalties())
def test_truncate_is_the_best_approximation_of_the_adapters_rank(update, penalty):
    A, B, U, V, scaling = update
    result = correct(A, B, U, V, penalty, scaling)
    assert result.lora_A.shape == A.shape
    assert result.lora_B.shape == B.shape
    X, closest, delta = (
        dense(result.lora_A, result.lora_B, scaling),
        reference(A, B, U, V, scaling, penalty),
        dense(A, B, scaling),
    )
    sigma = torch.linalg.svdvals(closest)
    tail = sigma[A.shape[0] :].norm().item()  # Eckart–Young: no matrix of rank r is closer
    assert (X - closest).norm().item() <= tail + 1e-5 * max(closest.norm().item(), 1e-3 * delta.norm().item())
    if closest.norm() > 1e-3 * delta.norm():
        assert result.truncation_error == pytest.approx(tail / closest.norm().item(), abs=2e-5)
    assert result.relative_change == pytest.approx(((X - delta).norm() / delta.norm()).item(), abs=2e-5)
    assert result.update_norm == pytest.approx(delta.norm().item(), rel=1e-5)
    assert result.closest_norm == pytest.approx(closest.norm().item(), rel=1e-4, abs=1e-4 * delta.norm().item())
    assert result.corrected_norm == pytest.approx(X.norm().item(), rel=1e-4, abs=1e-4 * delta.norm().item())


@settings(CASES, max_examples=60)
@given(updates(), penalties())
def test_closest_update_is_the_solution_of_the_least_squares_problem(update, penalty):
    """``argmin ‖X − Δ‖² + Σ λ_b ‖Π_b X‖²`` by stacking ``√λ_b Π_b`` under the identity, with no use of gains."""
    A, B, U, V, scaling = update
    assume(A.shape[1] * B.shape[0] <= 120)
    delta = dense(A, B, scaling)
    result = correct(A, B, U, V, penalty, scaling, rank="expand")
    weights = multipliers(penalty, result.relative_energy)
    assume(all(math.isfinite(weight) for weight in weights.values()))
    size = delta.numel()
    identity = torch.eye(size, dtype=torch.float64)
    columns = [blocks_of(unit.view_as(delta), U, V) for unit in identity]
    rows = [identity]
    for block in BLOCKS:
        projector = torch.stack([column[block].flatten() for column in columns], dim=1)
        rows.append(math.sqrt(weights[block]) * projector)
    right = torch.cat([delta.flatten(), torch.zeros(4 * size, dtype=torch.float64)])
    solution = torch.linalg.lstsq(torch.cat(rows), right[:, None]).solution.view_as(delta)
    assert_close(dense(result.lora_A, result.lora_B, scaling), solution, delta)


@settings(CASES, max_examples=60)
@given(updates(), penalties())
def test_gradient_of_the_objective_vanishes_at_the_closest_update(update, penalty):
    A, B, U, V, scaling = update
    result = correct(A.double(), B.double(), U.double(), V.double(), penalty, scaling, rank="expand")
    weights = multipliers(penalty, result.relative_energy)
    assume(all(weight < 1e6 for weight in weights.values()))
    X = dense(result.lora_A, result.lora_B, scaling).requires_grad_()
    delta = dense(A, B, scaling)
    parts = blocks_of(X, U, V)
    loss = (X - delta).square().sum() + sum(weights[block] * parts[block].square().sum() for block in BLOCKS)
    (gradient,) = torch.autograd.grad(loss, X)
    # U and V are orthonormal to float32 only, and the largest multiplier amplifies what is missing.
    assert gradient.norm() <= 1e-5 * (1 + max(weights.values())) * delta.norm()


@settings(CASES, max_examples=60)
@given(updates(), penalties(), st.integers(0, 1000))
def test_result_does_not_depend_on_the_gauge(update, penalty, seed):
    A, B, U, V, scaling = (part.double() if isinstance(part, Tensor) else part for part in update)
    generator = torch.Generator().manual_seed(seed)
    r = A.shape[0]
    G = torch.eye(r) + 0.3 * torch.randn(r, r, generator=generator) / math.sqrt(r)
    G = G.double()
    here, there = (
        correct(A, B, U, V, penalty, scaling),
        correct(torch.linalg.solve(G, A), B @ G, U, V, penalty, scaling),
    )
    delta = dense(A, B, scaling)
    sigma = torch.linalg.svdvals(reference(A, B, U, V, scaling, penalty))
    if len(sigma) > r:  # where two singular values tie at the cut, the best approximation is not unique
        assume(sigma[r - 1] - sigma[r] > 1e-4 * sigma[0])
    assert_close(
        dense(there.lora_A, there.lora_B, scaling), dense(here.lora_A, here.lora_B, scaling), delta, tolerance=1e-6
    )
    for block in BLOCKS:
        assert there.energy[block] == pytest.approx(here.energy[block], rel=1e-6, abs=1e-9 * delta.norm().item() ** 2)


@CASES
@given(updates(), penalties())
def test_energies_and_gains(update, penalty):
    A, B, U, V, scaling = update
    result = correct(A, B, U, V, penalty, scaling)
    parts, delta = blocks_of(dense(A, B, scaling), U, V), dense(A, B, scaling)
    total = delta.norm().item() ** 2
    for block in BLOCKS:
        assert result.energy[block] == pytest.approx(parts[block].norm().item() ** 2, rel=1e-5, abs=1e-6 * total)
        assert 0.0 <= result.gain[block] <= 1.0
    assert sum(result.energy.values()) == pytest.approx(total, rel=1e-5)
    assert sum(result.relative_energy.values()) == pytest.approx(1.0)


@CASES
@given(updates(), st.sampled_from(["csulora", "separable", "guard"]))
def test_strength_zero_changes_no_bit(update, preset):
    A, B, U, V, scaling = update
    result = correct(A, B, U, V, getattr(Penalty, preset)(0.0), scaling)
    assert torch.equal(result.lora_A, A)
    assert torch.equal(result.lora_B, B)
    assert result.relative_change == 0.0


@CASES
@given(updates(), st.sampled_from([Penalty.projection(), Penalty.guard(math.inf)]))
def test_hard_limits_are_idempotent(update, penalty):
    A, B, U, V, scaling = (part.double() if isinstance(part, Tensor) else part for part in update)
    once = correct(A, B, U, V, penalty, scaling)
    twice = correct(once.lora_A, once.lora_B, U, V, penalty, scaling)
    expected = dense(once.lora_A, once.lora_B, scaling)
    assert_close(dense(twice.lora_A, twice.lora_B, scaling), expected, dense(A, B, scaling), tolerance=1e-4)


@CASES
@given(updates(), STRENGTHS)
def test_tables_of_rank_one_keep_the_rank_exactly(update, strength):
    A, B, U, V, scaling = update
    for penalty in (Penalty.separable(strength), Penalty.guard(strength), Penalty.projection()):
        result = correct(A, B, U, V, penalty, scaling)
        assert result.truncation_error == 0.0
        expected = reference(A, B, U, V, scaling, penalty)
        assert_close(dense(result.lora_A, result.lora_B, scaling), expected, dense(A, B, scaling))


@settings(CASES, max_examples=60)
@given(updates(), st.floats(0.5, 50.0), st.integers(0, 1000))
def test_truncated_factors_stay_as_close_to_the_old_ones_as_a_rotation_allows(update, strength, seed):
    A, B, U, V, scaling = (part.double() if isinstance(part, Tensor) else part for part in update)
    result = correct(A, B, U, V, Penalty.csulora(strength), scaling)
    assume(result.truncation_error > 0 or result.relative_change > 1e-9)
    assume(len(set(result.gain.values())) > 1)
    assume(abs(result.gain["aligned"] * result.gain["off"] - result.gain["output"] * result.gain["input"]) > 1e-9)
    distance = (result.lora_A - A).square().sum() + (result.lora_B - B).square().sum()
    generator = torch.Generator().manual_seed(seed)
    for size in (1.0, 0.01):
        noise = size * torch.randn(len(A), len(A), generator=generator, dtype=torch.float64)
        rotation = torch.linalg.matrix_exp(noise - noise.T)
        rotated = (rotation.T @ result.lora_A - A).square().sum() + (result.lora_B @ rotation - B).square().sum()
        assert distance <= rotated * (1 + 1e-9)
    ratio = (result.lora_A.norm() / result.lora_B.norm()).item()
    assert ratio == pytest.approx((A.norm() / B.norm()).item(), rel=1e-6)


@pytest.mark.parametrize("penalty", [Penalty.csulora(3), Penalty.guard(3), Penalty.projection()])
def test_an_update_of_zero_stays_zero(penalty):
    A, B, basis = torch.randn(2, 6), torch.zeros(5, 2), torch.eye(6)
    result = correct(A, B, basis[:5, :2], basis[:, :2], penalty)
    assert torch.equal(result.lora_B, B)
    assert set(result.relative_energy.values()) == {0.0}
    assert result.relative_change == result.truncation_error == result.update_norm == result.corrected_norm == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("penalty", [Penalty.csulora(3), Penalty.guard(3)])
def test_dtypes_are_kept_and_only_the_last_cast_rounds(dtype, penalty):
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(3, 12, generator=generator).to(dtype).requires_grad_()
    B = torch.randn(10, 3, generator=generator).to(dtype).requires_grad_()
    U, V = random_basis(10, 3, generator), random_basis(12, 3, generator)
    before, state = (A.clone(), B.clone()), torch.get_rng_state()
    result = correct(A, B, U, V, penalty)
    wide = correct(A.double(), B.double(), U, V, penalty)
    assert result.lora_A.dtype == result.lora_B.dtype == dtype
    assert not result.lora_A.requires_grad
    assert torch.equal(result.lora_A, wide.lora_A.to(dtype))
    assert torch.equal(result.lora_B, wide.lora_B.to(dtype))
    assert torch.equal(A, before[0])
    assert torch.equal(B, before[1])
    assert torch.equal(torch.get_rng_state(), state)


class LargestTensor(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("penalty", [Penalty.csulora(3), Penalty.guard(3)])
def test_no_square_matrix_of_the_models_size_is_formed(penalty):
    d, r, k = 2000, 4, 8
    A, B, U = torch.randn(r, d), torch.randn(d, r), torch.linalg.qr(torch.randn(d, k))[0]
    with LargestTensor() as seen:
        correct(A, B, U, U, penalty)
    assert d * r <= seen.numel <= 4 * d * (r + k)


def test_penalties_are_values():
    assert Penalty.guard(3) == Penalty.guard(3.0) != Penalty.guard(4)
    assert Penalty.guard(3) != Penalty.csulora(3)
    for penalty in (Penalty.csulora(2), Penalty.projection(), Penalty.table(off=math.inf)):
        copy = pickle.loads(pickle.dumps(penalty))
        assert copy == penalty
        shares = dict.fromkeys(BLOCKS, 0.25)
        assert copy.multipliers(shares) == penalty.multipliers(shares)
    assert repr(Penalty.guard(3)) == "Penalty(name='guard', parameters={'strength': 3.0})"
    assert Penalty.table(off=math.inf).to_json() == {
        "name": "table",
        "aligned": 0.0,
        "output": 0.0,
        "input": 0.0,
        "off": "inf",
    }


@pytest.mark.parametrize("strength", [-1.0, math.nan, True, "3", None])
def test_a_strength_that_is_no_size_is_refused(strength):
    with pytest.raises(
        ValueError, match=re.escape("`strength`: expected a number ≥ 0 (math.inf is allowed), but got")
    ):
        Penalty.guard(strength)


GOOD = {"lora_A": torch.ones(2, 6), "lora_B": torch.ones(5, 2), "U": torch.eye(5)[:, :2], "V": torch.eye(6)[:, :2]}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lora_A": torch.ones(6)}, "`lora_A`: expected a matrix (r, d_in), but got shape (6,)."),
        (
            {"lora_B": torch.ones(5, 2, dtype=torch.int64)},
            "`lora_B`: expected a floating-point matrix, but got torch.int64",
        ),
        ({"lora_B": torch.ones(5, 3)}, "`lora_B`: expected 2 columns, the rank r of `lora_A`, but got shape (5, 3)."),
        ({"U": torch.eye(4)}, "`U`: expected 5 rows, d_out of `lora_B`, but got shape (4, 4)."),
        ({"V": torch.eye(5)}, "`V`: expected 6 rows, d_in of `lora_A`, but got shape (5, 5)."),
        ({"lora_A": torch.full((2, 6), math.nan)}, "`lora_A`: expected finite values, but got NaN or Inf."),
        ({"rank": "shrink"}, "`rank`: expected 'truncate' or 'expand', but got 'shrink'."),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changed, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        correct(**{**GOOD, **changed}, penalty=Penalty.guard(1))


def test_result_is_a_correction():
    assert isinstance(correct(**GOOD, penalty=Penalty.csulora()), Correction)


@pytest.mark.parametrize("name", ["U", "V"])
def test_a_basis_that_is_not_finite_is_refused(name):
    with pytest.raises(ValueError, match=f"`{name}`: expected finite values"):
        correct(**{**GOOD, name: GOOD[name] * math.nan}, penalty=Penalty.guard(1))


def test_a_huge_strength_is_the_hard_limit():
    shares = dict.fromkeys(BLOCKS, 0.25)
    assert Penalty.guard(1e200).gain(shares) == pytest.approx(Penalty.guard(math.inf).gain(shares), abs=1e-100)


def test_strength_zero_keeps_the_sign_of_zero():
    lora_A = torch.tensor([[-0.0, 1.0, 2.0, 3.0, 4.0, 5.0]] * 2)
    result = correct(**{**GOOD, "lora_A": lora_A}, penalty=Penalty.csulora(0.0))
    assert torch.equal(result.lora_A.signbit(), lora_A.signbit())
