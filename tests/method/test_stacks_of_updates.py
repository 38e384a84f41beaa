"""Several modules at once are what each is alone, with large products in float64 and in float32."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from csulora_callback import Penalty
from csulora_callback.method.basis import Basis
from csulora_callback.method.closest import correct_each
from csulora_callback.method.drift import Effect, drift_metrics
from csulora_callback.method.forecast import foresee
from csulora_callback.method.gauge import CorrectionOverflowError
from csulora_callback.method.grams import Grams
from csulora_callback.method.measure import chance_shares, kept_displacement
from csulora_callback.method.token_space import input_gain
from tests.helpers.updates import DOUBLE, KINDS, SINGLE, Update, allowance, make_update, penalty_of, presets, reference

CASES = settings(derandomize=True, deadline=None, max_examples=60)


@st.composite
def stacks(draw, dtypes=SINGLE, kinds=(*KINDS, "zero", "nearly inside U"), same_k=False):
    """Some updates of one shape: large beside small, of full rank and not, and such as are zero."""
    d_out, d_in, r = draw(st.integers(2, 20)), draw(st.integers(2, 20)), draw(st.integers(1, 6))
    k_out = draw(st.integers(0, min(d_out, d_in)))
    k_in = k_out if same_k else draw(st.integers(0, d_in))
    made = []
    for _ in range(draw(st.integers(1, 4))):
        kind, size = draw(st.sampled_from(kinds)), draw(st.sampled_from([1.0, 1.0, 100.0, 1e-3]))
        plain = kind if kind in KINDS else "gaussian"
        scaling = draw(st.sampled_from([1.0, 0.25, 16.0, -2.0]))
        update = make_update(d_out, d_in, r, k_out, k_in, plain, scaling, draw(st.integers(0, 2**31)), dtypes)
        if kind == "nearly inside U":
            update = update._replace(B=(update.U @ update.U.T + 1e-3 * torch.eye(d_out)).to(update.B) @ update.B)
        made.append(update._replace(B=update.B * (0.0 if kind == "zero" else size)))
    return made


def correct_together(made: list[Update], preset, rank="truncate", **options):
    factors = [torch.stack(parts) for parts in list(zip(*made, strict=True))[:4]]
    return correct_each(*factors, penalty_of(preset), [update.scaling for update in made], rank, **options)


def size_of(update: Update) -> float:
    return (update.scaling * update.A.double().norm() * update.B.double().norm()).abs().item()


@CASES
@given(stacks(DOUBLE), presets(), st.sampled_from(["truncate", "expand"]))
def test_together_they_are_what_each_is_alone_and_what_dense_matrices_give(made, preset, rank):
    for update, together in zip(made, correct_together(made, preset, rank), strict=True):
        alone, closest, size = update.correct(preset, rank), reference(update, preset).closest, size_of(update)
        for field in ("energy", "relative_energy", "gain"):
            assert getattr(together, field) == pytest.approx(getattr(alone, field), rel=1e-9, abs=1e-12 * size**2)
        for field in ("relative_change", "truncation_error", "closest_norm", "update_norm"):
            assert getattr(together, field) == pytest.approx(getattr(alone, field), rel=1e-7, abs=1e-7)
        for field in ("along", "corrected_along", "lora_A", "lora_B"):
            assert getattr(together, field).shape == getattr(alone, field).shape
        tail = 0.0 if rank == "expand" else torch.linalg.svdvals(closest)[len(update.A) :].norm().item()
        assert (update.of(together) - closest).norm() <= tail + allowance(closest, update.delta, 1e-9)


@CASES
@given(stacks(), presets(), st.sampled_from(["truncate", "expand"]))
def test_large_products_in_float32_cost_what_is_stated(made, preset, rank):
    """What an accelerator computes, relative to the sizes of the factors."""
    narrow = correct_together(made, preset, rank, wide=torch.float32)
    for update, single, double in zip(made, narrow, correct_together(made, preset, rank), strict=True):
        size, closest = size_of(update), reference(update, preset).closest
        if any(abs(one - double.gain[b]) > 1e-3 for b, one in single.gain.items()):
            continue  # an infinite strength on a share that is zero up to rounding gives either limit
        tail = 0.0 if rank == "expand" else torch.linalg.svdvals(closest)[len(update.A) :].norm().item()
        assert (update.of(single) - closest).norm().item() <= tail + 3e-5 * size
        assert single.update_norm == pytest.approx(double.update_norm, abs=1e-5 * size)
        assert single.closest_norm == pytest.approx(double.closest_norm, abs=3e-5 * size)
        assert (single.along - double.along).norm().item() <= 1e-5 * size


def effects_of(made: list[Update], corrections: list) -> list[Effect]:
    return [Effect.of(done, basis_of(update)) for update, done in zip(made, corrections, strict=True)]


def basis_of(update: Update) -> Basis:
    k = update.U.shape[1]
    sigma = torch.linspace(2.0, 1.0, k)
    return Basis(update.U.float(), update.V.float(), sigma, displacement=10.0)


def measurable(made: list[Update]) -> tuple[list, tuple]:
    """What the Gram matrices are of, and what else a forecast knows of the modules."""
    bases = [basis_of(update) for update in made]
    of = [torch.stack(parts) for parts in list(zip(*made, strict=True))[:4]]
    chances = [chance_shares(update.U.shape, update.V.shape) for update in made]
    known = [update.scaling for update in made], chances, [kept_displacement(basis) for basis in bases]
    return [*of, torch.stack([basis.singular_values for basis in bases])], known


def forecast(made: list[Update], penalty: Penalty, gains=None, wide=torch.float32, largest=math.inf):
    of, known = measurable(made)
    return foresee(Grams.of(*of, wide, gains), *known, penalty, largest)


def check_alike(made: list[Update], seen: dict[str, float], expected: dict[str, float]) -> None:
    """To the 1e-4 that is stated; a share over chance is that share over a constant."""
    assert seen.keys() == expected.keys()
    along = sum(size_of(update) * basis_of(update).singular_values.norm().item() for update in made)
    displacement = sum(kept_displacement(basis_of(update)) for update in made) or 1.0
    for key in expected:
        if "over_chance" not in key:
            power = 2 if key == "csulora/truncation_error" else 1
            scale = along / displacement if "undone" in key else max(1.0, expected["csulora/update_norm"])
            assert abs(seen[key] ** power - expected[key] ** power) <= 1e-4 * scale, key


@CASES
@given(stacks(same_k=True), presets(st.floats(0.0, 100.0)))
def test_a_forecast_is_what_the_correction_does_or_is_none(made, preset):
    found, corrections = forecast(made, penalty_of(preset)), correct_together(made, preset)
    whole, closest = (sum(norm**2 for norm in norms) for norms in zip(*map(norms_of, corrections), strict=True))
    if found is not None and closest >= 1e-3 * whole:  # of what is next to nothing no share is told
        check_alike(made, drift_metrics(found), drift_metrics(effects_of(made, corrections)))


def norms_of(done) -> tuple[float, float]:
    return done.update_norm, done.closest_norm


@CASES
@given(stacks(same_k=True, kinds=("gaussian", "unbalanced", "inside U", "zero")), presets(st.floats(0.0, 100.0)))
def test_ordinary_updates_are_foreseen(made, preset):
    assert forecast(made, penalty_of(preset)) is not None


@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_a_data_aware_penalty_is_foreseen(wide):
    made = [make_update(12, 10, 3, 2, 2, seed=seed) for seed in range(3)]
    tokens = torch.randn(8, 10, generator=torch.Generator().manual_seed(1))
    gains = [input_gain(tokens[:4], tokens[4:], strength) for strength in (1.0, 10.0, 0.0)]
    corrections = correct_together(made, ("data_aware", (3.0,)), input_gains=gains)
    expected = drift_metrics(effects_of(made, corrections))
    seen = drift_metrics(forecast(made, Penalty.data_aware(3.0), gains, wide))
    assert seen == pytest.approx(expected, rel=1e-4, abs=1e-5)
    for update, done, gain in zip(made, corrections, gains, strict=True):
        X = update.delta @ gain(torch.eye(10).double())
        assert (update.of(done) - X).norm() <= 1e-5 * X.norm()
        assert done.closest_norm == pytest.approx(X.norm().item(), rel=1e-5)
        assert done.relative_change == pytest.approx(
            ((X - update.delta).norm() / update.delta.norm()).item(), abs=1e-5
        )


def cancelling(update: Update) -> Update:
    """Columns that are equal but for a thousandth, with opposite signs on the other side."""
    A, B = update.A.clone(), update.B.clone()
    A[1], B[:, 1] = -A[0] + 1e-3 * A[1], B[:, 0] + 1e-3 * B[:, 1]
    return update._replace(A=A[:2], B=B[:, :2])


UNTOLD = {
    "not a number": lambda update: update._replace(A=update.A * math.nan),
    "infinite": lambda update: update._replace(B=update.B * math.inf),
    "too large to square": lambda update: update._replace(B=update.B * 1e25),
    "too small to square": lambda update: update._replace(A=update.A * 1e-18),
    "cancelling": cancelling,
}


@pytest.mark.parametrize("kind", UNTOLD)
def test_what_float32_does_not_tell_is_not_foreseen(kind):
    assert forecast([UNTOLD[kind](make_update(12, 10, 3, 2, 2))], Penalty.csulora(3.0)) is None


def test_nothing_is_foreseen_where_a_correction_might_overflow():
    update = make_update(12, 10, 3, 2, 2)
    largest = 2.0 * max(update.A.norm().item(), update.B.norm().item())
    assert forecast([update], Penalty.csulora(3.0), largest=largest) is not None
    assert forecast([update], Penalty.csulora(3.0), largest=largest / 8) is None


def test_an_error_names_the_module():
    made = [make_update(5, 6, 2, 2, 3), make_update(5, 6, 2, 2, 3)._replace(scaling=1e200)]
    with pytest.raises(CorrectionOverflowError, match=r"^module .second.: `lora_A`, `lora_B`: expected an update"):
        correct_together(made, ("guard", (1.0,)), names=["first", "second"])


class Waits(TorchDispatchMode):
    """Counts what waits for a device: numbers that are asked of tensors one by one."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("preset", [("csulora", (10.0,)), ("guard", (10.0,))])
def test_no_number_is_asked_of_a_single_module(preset):
    made = [make_update(12, 10, 3, 2, 2, seed=seed) for seed in range(5)]
    of, known = measurable(made)
    with Waits() as seen:
        correct_together(made, preset)
        foresee(Grams.of(*of, torch.float32), *known, penalty_of(preset))
    assert seen.count == 0
    with Waits() as seen:
        torch.ones(1).item()
    assert seen.count == 1
