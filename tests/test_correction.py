"""The correction against references written from its definition, in dense float64, and its properties."""

import math
import pickle
import re
from typing import NamedTuple

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from csulora_callback import Correction, Penalty, correct

CASES = settings(derandomize=True, deadline=None, max_examples=150)
BLOCKS = ("aligned", "output", "input", "off")
FINITE = st.one_of(st.just(0.0), st.floats(0.01, 100.0))
Preset = tuple[str, tuple[float, ...]]  # a constructor of Penalty and its arguments


class Update(NamedTuple):
    A: Tensor
    B: Tensor
    U: Tensor
    V: Tensor
    scaling: float = 1.0

    @property
    def delta(self) -> Tensor:
        return self.scaling * self.B.double() @ self.A.double()

    def correct(self, preset: Preset, rank: str = "truncate") -> Correction:
        return correct(self.A, self.B, self.U, self.V, penalty_of(preset), self.scaling, rank)

    def of(self, result: Correction) -> Tensor:
        """The update that a result stands for, dense."""
        return self._replace(A=result.lora_A, B=result.lora_B).delta


def make_update(d_out, d_in, r, k_out, k_in, kind="gaussian", scaling=1.0, seed=0, dtypes=(torch.float32,) * 2):
    """Factors in the first dtype, bases in the second."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    A, B = normal(r, d_in), normal(d_out, r)
    U, V = (torch.linalg.qr(normal(d, d))[0][:, :k] for d, k in ((d_out, k_out), (d_in, k_in)))
    if kind == "unbalanced":
        A, B = A * 100, B * 1e-3
    elif kind == "dead columns":
        B[:, r // 2 :] = 0
    elif kind == "repeated columns":
        B = B[:, :1].expand(d_out, r)
    elif kind == "inside U":
        B = U @ U.T @ B
    factors, bases = dtypes
    return Update(A.to(factors), B.to(factors), U.to(bases), V.to(bases), scaling)


@st.composite
def updates(draw, dtypes=(torch.float32,) * 2, largest=24):
    """Any shape: subspaces from empty to full, ranks above the dimensions, factors of deficient rank."""
    d_out, d_in = draw(st.integers(1, largest)), draw(st.integers(1, largest))
    r = draw(st.one_of(st.integers(1, 3), st.integers(1, 28)))
    k_out, k_in = (draw(st.one_of(st.sampled_from([0, d]), st.integers(0, d))) for d in (d_out, d_in))
    kind = draw(st.sampled_from(["gaussian", "unbalanced", "dead columns", "repeated columns", "inside U"]))
    scaling = draw(st.sampled_from([1.0, 0.25, 16.0, -2.0]))
    return make_update(d_out, d_in, r, k_out, k_in, kind, scaling, draw(st.integers(0, 2**31)), dtypes)


DOUBLE = updates((torch.float64,) * 2)
GQA, WIDE_RANK = make_update(16, 96, 8, 5, 12), make_update(4, 48, 16, 2, 20, scaling=-2.0)


def presets(strengths=st.one_of(FINITE, st.just(math.inf)), names=("csulora", "separable", "guard", "projection")):
    one = st.sampled_from(names).flatmap(
        lambda name: st.tuples(st.just(name), st.just(()) if name == "projection" else st.tuples(strengths))
    )
    return st.one_of(one, st.tuples(st.just("table"), st.tuples(*[strengths] * 4)))


def penalty_of(preset: Preset) -> Penalty:
    return getattr(Penalty, preset[0])(*preset[1])


def projectors(U: Tensor, V: Tensor) -> list[tuple[Tensor, Tensor]]:
    """``(L, R)`` by block, in the order of ``BLOCKS``: the block of ``X`` is ``L X R``."""
    P_U, P_V = U.double() @ U.double().T, V.double() @ V.double().T
    Q_U, Q_V = torch.eye(len(U)) - P_U, torch.eye(len(V)) - P_V
    return [(P_U, P_V), (P_U, Q_V), (Q_U, P_V), (Q_U, Q_V)]


def multipliers(preset: Preset, rho: list[float]) -> tuple[float, ...]:
    """``λ`` in the order of ``BLOCKS``, from the table of the design."""
    name, arguments = preset
    if name == "table":
        return arguments
    if name == "projection":
        return (0.0, math.inf, math.inf, math.inf)
    (s,) = arguments
    if name == "guard":
        return ((1 + s) ** 2 - 1, s, s, 0.0)
    output, input_, both, off = (s * x if x else 0.0 for x in (rho[1], rho[2], rho[1] + rho[2], rho[3]))
    return (0.0, both, both, off) if name == "csulora" else (0.0, output, input_, (1 + output) * (1 + input_) - 1)


class Reference(NamedTuple):
    energy: list[float]
    rho: list[float]
    lambdas: tuple[float, ...]
    closest: Tensor


def reference(update: Update, preset: Preset) -> Reference:
    parts = [left @ update.delta @ right for left, right in projectors(update.U, update.V)]
    energy = [part.square().sum().item() for part in parts]
    rho = [e / (sum(energy) or 1.0) for e in energy]
    lambdas = multipliers(preset, rho)
    return Reference(energy, rho, lambdas, sum(p / (1 + x) for p, x in zip(parts, lambdas, strict=True)))


def assert_close(X: Tensor, expected: Tensor, delta: Tensor, tolerance: float = 1e-5) -> None:
    """Relative to ``‖X*‖``, what is shipped, as long as that is not tiny against ``‖Δ‖``.

    A basis in float32 is orthonormal to about 1e-7, so ``PΔ`` leaks 1e-7 of ``‖Δ‖`` into the other blocks. An ``X*``
    with next to nothing else in it (full ``k`` under ``guard(inf)``) is that leak, and the inputs do not define it.
    """
    scale = max(expected.norm().item(), 1e-4 * delta.norm().item())
    assert (X - expected).norm().item() <= tolerance * scale


@CASES
@given(updates(), presets())
@example(GQA, ("csulora", (10.0,)))
@example(WIDE_RANK, ("csulora", (10.0,)))
@example(make_update(1, 1, 1, 1, 1), ("guard", (3.0,)))
def test_result_agrees_with_dense_projectors(update, preset):
    delta, (energy, rho, lambdas, closest) = update.delta, reference(update, preset)
    size, r = delta.norm().item(), len(update.A)
    expanded, result = update.correct(preset, "expand"), update.correct(preset)

    assert_close(update.of(expanded), closest, delta)
    assert len(expanded.lora_A) == expanded.lora_B.shape[1] <= 2 * r
    assert expanded.truncation_error == 0.0

    assert result.lora_A.shape == update.A.shape
    assert result.lora_B.shape == update.B.shape
    X, tail = update.of(result), torch.linalg.svdvals(closest)[r:].norm().item()
    assert (X - closest).norm().item() <= tail + 1e-5 * max(closest.norm().item(), 1e-4 * size)
    if closest.norm() > 1e-4 * size:
        assert result.truncation_error == pytest.approx(tail / closest.norm().item(), abs=1e-5)
    assert result.update_norm == pytest.approx(size, rel=1e-6)
    assert result.closest_norm == pytest.approx(closest.norm().item(), rel=1e-5, abs=1e-6 * size)
    assert result.corrected_norm == pytest.approx(X.norm().item(), rel=1e-5, abs=1e-6 * size)
    for corrected in (expanded, result):
        change = (update.of(corrected) - delta).norm().item() / (size or 1.0)
        assert corrected.relative_change == pytest.approx(change, abs=1e-6)
        assert list(corrected.energy.values()) == pytest.approx(energy, rel=1e-6, abs=1e-12 * size**2)
        assert list(corrected.relative_energy.values()) == pytest.approx(rho, abs=1e-6)
        assert tuple(corrected.energy) == tuple(corrected.relative_energy) == tuple(corrected.gain) == BLOCKS
        for gain, multiplier, share in zip(corrected.gain.values(), lambdas, rho, strict=True):
            assert 0.0 <= gain <= 1.0
            # 0 or 1 where an infinite strength meets a share that is zero up to rounding: nothing is attenuated
            assert share < 1e-12 or gain == pytest.approx(1 / (1 + multiplier), abs=1e-6)
    assert sum(result.energy.values()) == pytest.approx(size**2, rel=1e-6)
    assert sum(result.relative_energy.values()) == pytest.approx(1.0 if size else 0.0)


@CASES
@given(updates((torch.float32, torch.float64), largest=10), presets(FINITE, ("csulora", "separable", "guard")))
@example(make_update(3, 24, 2, 1, 7), ("csulora", (10.0,)))
def test_closest_update_solves_the_least_squares_problem(update, preset):
    """``argmin ‖X − Δ‖² + Σ λ_b ‖Π_b X‖²`` over ``vec X``: ``√λ_b Π_b`` stacked under the identity, no gains."""
    delta, lambdas = update.delta, reference(update, preset).lambdas
    operators = [torch.kron(left, right.T.contiguous()) for left, right in projectors(update.U, update.V)]
    rows = torch.cat(
        [torch.eye(delta.numel()).double(), *(math.sqrt(x) * op for x, op in zip(lambdas, operators, strict=True))]
    )
    target = torch.cat([delta.flatten(), delta.new_zeros(len(rows) - delta.numel())])
    solution = torch.linalg.lstsq(rows, target[:, None], driver="gelsd").solution.view_as(delta)
    assert_close(update.of(update.correct(preset, "expand")), solution, delta)


@CASES
@given(DOUBLE, presets(FINITE, ("csulora", "separable", "guard")))
def test_gradient_of_the_objective_vanishes_at_the_closest_update(update, preset):
    X = update.of(update.correct(preset, "expand")).requires_grad_()
    delta, lambdas = update.delta, reference(update, preset).lambdas
    blocks = zip(lambdas, projectors(update.U, update.V), strict=True)
    loss = (X - delta).square().sum() + sum(x * (left @ X @ right).square().sum() for x, (left, right) in blocks)
    (gradient,) = torch.autograd.grad(loss, X)
    assert gradient.norm() <= 1e-11 * (1 + max(lambdas)) * delta.norm()


@CASES
@given(DOUBLE, presets(), st.integers(0, 1000))
def test_result_does_not_depend_on_the_gauge(update, preset, seed):
    r, delta, closest = len(update.A), update.delta, reference(update, preset).closest
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(3, r, r, generator=generator, dtype=torch.float64)
    (left, right), stretch = torch.linalg.qr(noise[:2])[0], torch.logspace(-1, 2, r, dtype=torch.float64)
    G = left @ (stretch[:, None] * right)
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
@given(DOUBLE, presets(), st.integers(0, 1000))
@example(make_update(12, 20, 3, 4, 6, dtypes=(torch.float64,) * 2), ("csulora", (10.0,)), 0)
def test_truncate_is_beaten_by_no_other_matrix_of_its_rank(update, preset, seed):
    """Eckart–Young: the error is the tail of the singular values; random factors and ALS do not get below it."""
    closest, size, r = reference(update, preset).closest, update.delta.norm().item(), len(update.A)
    result = update.correct(preset)
    error = (update.of(result) - closest).norm().item()
    assert error == pytest.approx(torch.linalg.svdvals(closest)[r:].norm().item(), abs=1e-9 * size)
    assert torch.linalg.matrix_rank(update.of(result)) <= r
    if closest.norm() > 1e-6 * size:
        assert result.truncation_error == pytest.approx(error / closest.norm().item(), abs=1e-9)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(update.B.shape, generator=generator, dtype=torch.float64)
    for start in (noise, result.lora_B + 0.1 * noise):
        B = start
        for _ in range(5):
            A = torch.linalg.pinv(B) @ closest
            assert (B @ A - closest).norm().item() >= error - 1e-9 * size
            B = closest @ torch.linalg.pinv(A)


@CASES
@given(updates(), presets(names=("separable", "guard", "projection")))
def test_tables_of_rank_one_are_written_exactly_at_the_same_rank(update, preset):
    assume(preset[0] != "table")
    for rank in ("truncate", "expand"):
        result = update.correct(preset, rank)
        assert result.truncation_error == 0.0
        assert len(result.lora_A) == len(update.A)
        assert_close(update.of(result), reference(update, preset).closest, update.delta)


@CASES
@given(updates(), st.sampled_from(["csulora", "separable", "guard", "table"]), st.sampled_from(["truncate", "expand"]))
def test_strength_zero_changes_no_bit(update, name, rank):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        A, B = update.A.to(dtype) + 0.0, update.B.to(dtype) + 0.0  # −0 becomes 0: the sign of zero is a test below
        result = update._replace(A=A, B=B).correct((name, (0.0,)), rank)
        assert torch.equal(result.lora_A.view(torch.uint8), A.view(torch.uint8))
        assert torch.equal(result.lora_B.view(torch.uint8), B.view(torch.uint8))
        assert result.relative_change == result.truncation_error == 0.0


@CASES
@given(DOUBLE, st.sampled_from([("projection", ()), ("guard", (math.inf,))]))
def test_hard_limits_are_idempotent(update, preset):
    once = update.correct(preset)
    twice = update._replace(A=once.lora_A, B=once.lora_B).correct(preset)
    assert (update.of(twice) - update.of(once)).norm() <= 1e-12 * update.delta.norm()


@CASES
@given(DOUBLE, st.floats(0.5, 50.0), st.integers(0, 1000))
@example(make_update(12, 20, 3, 4, 6, "unbalanced", -2.0, dtypes=(torch.float64,) * 2), 10.0, 0)
def test_truncated_factors_are_the_closest_to_the_old_ones(update, strength, seed):
    result, r = update.correct(("csulora", (strength,))), len(update.A)
    A, B, old_A, old_B = result.lora_A, result.lora_B, update.A, update.B
    size = (A.norm() * old_A.norm() + B.norm() * old_B.norm()).item()
    assert (A.norm() * old_B.norm()).item() == pytest.approx((B.norm() * old_A.norm()).item(), rel=1e-9)
    overlap = B.T @ old_B + A @ old_A.T  # Procrustes: no rotation helps if and only if this is symmetric and ≥ 0
    assert (overlap - overlap.T).norm().item() <= 1e-9 * size
    assert torch.linalg.eigvalsh(overlap).min().item() >= -1e-9 * size
    distance = (A - old_A).square().sum() + (B - old_B).square().sum()
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(r, r, generator=generator, dtype=torch.float64)
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
    assert result.lora_A.isfinite().all()
    assert result.lora_B.isfinite().all()
    assert set(result.energy.values()) == set(result.relative_energy.values()) == {0.0}
    assert all(0.0 <= gain <= 1.0 for gain in result.gain.values())
    assert result.relative_change == result.truncation_error == 0.0
    assert result.update_norm == result.closest_norm == result.corrected_norm == 0.0


@pytest.mark.parametrize("multipliers_", [(math.inf,) * 4, (math.inf, math.inf, 0.0, 1.0)])
def test_a_closest_update_of_zero_is_finite(multipliers_):
    update = make_update(5, 6, 2, 5, 6)._replace(U=torch.eye(5), V=torch.eye(6))  # all of it is aligned
    result = update.correct(("table", multipliers_))
    assert torch.equal(update.of(result), torch.zeros(5, 6).double())
    assert (result.relative_change, result.truncation_error, result.corrected_norm) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize("rank", ["truncate", "expand"])
@pytest.mark.parametrize("preset", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes_are_kept_and_only_the_last_cast_rounds(dtype, preset, rank):
    update = make_update(10, 12, 3, 3, 4, scaling=2.0, dtypes=(dtype, torch.float32))
    inputs = [tensor.clone() for tensor in update[:4]]
    update.A.requires_grad_(), update.B.requires_grad_()
    state = torch.get_rng_state()
    result = update.correct(preset, rank)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before) for tensor, before in zip(update[:4], inputs, strict=True))
    assert result.lora_A.dtype == result.lora_B.dtype == dtype
    assert not result.lora_A.requires_grad
    assert not result.lora_B.requires_grad
    wide = update._replace(A=inputs[0].double(), B=inputs[1].double()).correct(preset, rank)
    assert torch.equal(result.lora_A, wide.lora_A.to(dtype))
    assert torch.equal(result.lora_B, wide.lora_B.to(dtype))
    sigma = torch.linalg.svdvals(closest := reference(update, preset).closest.detach())
    allowed = sigma[len(result.lora_A) :].norm() + 4 * torch.finfo(dtype).eps * closest.norm()
    assert (update.of(result) - closest).norm() <= allowed


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize(("preset", "rank"), [(ALL[0], "truncate"), (ALL[0], "expand"), (ALL[4], "truncate")])
def test_no_matrix_of_the_models_size_is_formed(preset, rank):
    d, r, k = 3000, 4, 8
    basis = torch.linalg.qr(torch.randn(d, k))[0]
    update = Update(torch.randn(r, d), torch.randn(d, r), basis, basis)
    with LargestTensor() as seen:
        update.correct(preset, rank)
    assert d * k <= seen.numel <= 4 * d * (r + k)


@given(st.lists(st.floats(0, 1), min_size=4, max_size=4), presets(st.floats(0, 1e100)))
@CASES
def test_gains_are_those_of_the_table_and_lie_between_zero_and_one(rho, preset):
    gains = penalty_of(preset).gain(dict(zip(BLOCKS, rho, strict=True)))
    assert tuple(gains) == BLOCKS
    assert all(0.0 <= gain <= 1.0 for gain in gains.values())
    assert list(gains.values()) == pytest.approx([1 / (1 + x) for x in multipliers(preset, rho)], rel=1e-12)


def test_penalties_are_values():
    assert Penalty.guard(3) == Penalty.guard(3.0) != Penalty.guard(4)
    assert Penalty.guard(3) != Penalty.csulora(3)
    assert repr(Penalty.guard(3)) == "Penalty(name='guard', parameters={'strength': 3.0})"
    assert repr(Penalty.projection()) == "Penalty(name='projection', parameters={})"
    shares = dict.fromkeys(BLOCKS, 0.25)
    for penalty in map(penalty_of, ALL):
        copy = pickle.loads(pickle.dumps(penalty))
        assert copy == penalty
        assert repr(copy) == repr(penalty)
        assert copy.gain(shares) == penalty.gain(shares)
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
NOT_FINITE = "`{}`: expected finite values, but got NaN or Inf."
REFUSED = [
    *(({n: GOOD[n][0]}, f"`{n}`: expected a matrix {AXES[n]}, but got shape {(GOOD[n].shape[1],)}.") for n in GOOD),
    *(({n: GOOD[n][None]}, f"`{n}`: expected a matrix {AXES[n]}, but got shape {(1, *GOOD[n].shape)}.") for n in GOOD),
    *(({n: GOOD[n].long()}, f"`{n}`: expected a floating-point matrix, but got torch.int64.") for n in GOOD),
    ({"lora_B": torch.ones(5, 3)}, "`lora_B`: expected 2 columns, the rank r of `lora_A`, but got shape (5, 3)."),
    ({"lora_A": torch.ones(3, 6)}, "`lora_B`: expected 3 columns, the rank r of `lora_A`, but got shape (5, 2)."),
    ({"U": torch.eye(4)}, "`U`: expected 5 rows, d_out of `lora_B`, but got shape (4, 4)."),
    ({"V": torch.eye(5)}, "`V`: expected 6 rows, d_in of `lora_A`, but got shape (5, 5)."),
    *(({n: GOOD[n] * x}, NOT_FINITE.format(n)) for n in ("lora_A", "lora_B") for x in (math.nan, math.inf)),
    ({"rank": "shrink"}, "`rank`: expected 'truncate' or 'expand', but got 'shrink'."),
    ({"rank": None}, "`rank`: expected 'truncate' or 'expand', but got None."),
]


@pytest.mark.parametrize(("changed", "message"), REFUSED)
def test_arguments_that_do_not_fit_are_refused(changed, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        correct(**{**GOOD, **changed}, penalty=Penalty.guard(1))


@pytest.mark.xfail(strict=True, reason="a NaN or Inf in a basis goes unnoticed into the factors")
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["U", "V"])
def test_a_basis_that_is_not_finite_is_refused(name, value):
    with pytest.raises(ValueError, match=re.escape(NOT_FINITE.format(name))):
        correct(**{**GOOD, name: GOOD[name] + value}, penalty=Penalty.guard(1))


@pytest.mark.xfail(
    strict=True, raises=OverflowError, reason="(1 + strength)**2 overflows instead of going to infinity"
)
def test_a_huge_strength_is_the_hard_limit():
    shares = dict.fromkeys(BLOCKS, 0.25)
    assert Penalty.guard(1e200).gain(shares) == pytest.approx(Penalty.guard(math.inf).gain(shares), abs=1e-100)


@pytest.mark.xfail(strict=True, reason="1·(−0) + 0·(…) is +0")
def test_strength_zero_keeps_the_sign_of_zero():
    A, B, U, V, _ = make_update(5, 6, 2, 2, 3)
    A[0] = -0.0
    assert torch.equal(correct(A, B, U, V, Penalty.csulora(0.0)).lora_A.signbit(), A.signbit())
