"""Factors at the ends of what their dtype holds: they come out finite and right, or are refused."""

import math

import pytest
import torch
from torch import Tensor

from csulora_callback import Penalty, correct
from csulora_callback.method.gauge import CorrectionOverflowError, narrowed
from csulora_callback.method.token_space import input_gain
from tests.helpers.updates import BLOCKS, make_update, penalty_of, reference

NARROW = [torch.float16, torch.bfloat16, torch.float32]
# Beside projection a table that takes the path through a singular value decomposition, with and without truncation.
CASES = [("projection", (), "truncate"), ("csulora", (1e9,), "truncate"), ("csulora", (1e9,), "expand")]


def concentrating(dtype: torch.dtype, size_B: float, size_A: float, d: int = 100):
    """Factors of equal entries, and a subspace whose projection gathers 5 times as much in the first entry."""
    direction = torch.ones(d, 1, dtype=torch.float64) / math.sqrt(d)
    direction[0] += 1.0
    direction /= direction.norm()
    update = make_update(d, d, 1, 1, 1)
    A, B = (torch.full(shape, size, dtype=dtype) for shape, size in (((1, d), size_A), ((d, 1), size_B)))
    return update._replace(A=A, B=B, U=direction, V=direction)


def relative_error(found: Tensor, expected: Tensor) -> float:
    size = expected.abs().max()
    return ((found / size - expected / size).norm() / (expected / size).norm()).item()


@pytest.mark.parametrize("large", ["A", "B"])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", NARROW)
def test_a_factor_that_would_overflow_hands_its_size_to_the_other(dtype, case, large):
    name, arguments, rank = case
    sizes = (0.9 * torch.finfo(dtype).max, 0.01)
    update = concentrating(dtype, *(sizes if large == "B" else sizes[::-1]))
    closest = reference(update, (name, arguments)).closest
    assert closest.abs().max() > 2 * 0.009 * torch.finfo(dtype).max  # it does concentrate
    result = update.correct((name, arguments), rank)
    assert torch.isfinite(result.lora_A).all()
    assert torch.isfinite(result.lora_B).all()
    assert (result.lora_A.dtype, result.lora_B.dtype) == (dtype, dtype)
    assert relative_error(update.of(result), closest) < 4 * torch.finfo(dtype).eps
    assert result.closest_norm == pytest.approx((closest / 1e30).norm().item() * 1e30, rel=1e-5)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", NARROW)
def test_what_fits_into_neither_factor_is_refused(dtype, case):
    name, arguments, rank = case
    size = 0.9 * torch.finfo(dtype).max
    update = concentrating(dtype, size, size)
    with pytest.raises(CorrectionOverflowError, match=f"^`lora_A`, `lora_B`: .* {str(dtype)[6:]} can hold"):
        update.correct((name, arguments), rank)
    assert issubclass(CorrectionOverflowError, ValueError)


def test_a_data_aware_correction_that_grows_hands_its_size_to_the_other():
    """Where the task excites nothing, the closest safe update may grow, and does here."""
    task, probes = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[1.0, 0.3, 0.0]])
    gain = input_gain(task, probes, strength=1e5, ridge=0.001)
    A, B, empty = torch.tensor([[60000.0, 0.0, 0.0]]), torch.ones(2, 1), torch.zeros(2, 0)
    expected = B.double() @ gain(A.double())
    assert expected.abs().max() > torch.finfo(torch.float16).max
    result = correct(A.half(), B.half(), empty, torch.zeros(3, 0), Penalty.data_aware(10.0), input_gain=gain)
    assert relative_error(result.lora_B.double() @ result.lora_A.double(), expected) < 1e-2


def test_only_the_rows_that_do_not_fit_are_moved():
    A = torch.tensor([[3e5, 1.0], [1.0, 2.0], [1.0, 5.0], [0.0, 0.0]], dtype=torch.float64)
    B = torch.tensor([[1.0, 7.0, 7e5, 1e9], [2.0, 9.0, 1.0, 0.0]], dtype=torch.float64)
    narrow_A, narrow_B, fits = narrowed(A, B, torch.float16, torch.float16)
    factors = torch.tensor([8.0, 1.0, 1 / 16, 1.0 / 2**14], dtype=torch.float64)
    assert torch.equal(narrow_A, (A / factors[:, None]).half())
    assert torch.equal(narrow_B, (B * factors).half())
    assert torch.isfinite(narrow_B).all()
    assert fits
    limit = torch.finfo(torch.float16).max
    kept = narrowed(torch.tensor([[limit, -limit]]), torch.tensor([[limit]]), torch.float16, torch.float16)
    assert [factor.tolist() for factor in kept[:2]] == [[[limit, -limit]], [[limit]]]


@pytest.mark.parametrize("exponent", [100, 60, -60, -110])
@pytest.mark.parametrize("preset", [("csulora", (3.0,)), ("guard", (3.0,)), ("separable", (3.0,))])
@pytest.mark.parametrize("rank", ["truncate", "expand"])
def test_huge_and_tiny_factors_are_corrected_as_ordinary_ones(exponent, preset, rank):
    """A power of two on both factors multiplies everything by powers of two, and every share by one."""
    unit = 2.0**exponent  # 1e30, and 1e-33: between them lies most of float32
    update = make_update(20, 24, 4, 3, 5, scaling=2.0)
    ordinary = update.correct(preset, rank)
    extreme = update._replace(A=update.A * unit, B=update.B * unit).correct(preset, rank)
    assert torch.equal(extreme.lora_A, ordinary.lora_A * unit)
    assert torch.equal(extreme.lora_B, ordinary.lora_B * unit)
    assert list(extreme.energy.values()) == [ordinary.energy[block] * unit**4 for block in BLOCKS]
    assert extreme.relative_energy == ordinary.relative_energy
    for field, factor in (("relative_change", 1), ("truncation_error", 1), ("closest_norm", unit**2)):
        value = getattr(extreme, field)
        assert math.isfinite(value)
        assert value == pytest.approx(getattr(ordinary, field) * factor, rel=1e-12)
    assert extreme.update_norm == pytest.approx(ordinary.update_norm * unit**2, rel=1e-12)


@pytest.mark.parametrize(("size", "scaling"), [(1e100, 1.0), (1.0, 1e200)])
def test_an_energy_that_overflows_is_refused(size, scaling):
    update = make_update(5, 6, 2, 2, 3, scaling=scaling)
    A, B = update.A.double() * size, update.B.double() * size
    with pytest.raises(CorrectionOverflowError, match=r"whose energy .* is finite in torch\.float64, but got inf"):
        correct(A, B, update.U, update.V, penalty_of(("guard", (1.0,))), scaling)
