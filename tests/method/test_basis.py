"""The basis of one module at the ends of what floating point holds, and what is refused as a basis."""

import dataclasses
import math
import re

import pytest
import torch
from torch import Tensor

from csulora_callback.method.basis import Basis, basis_of, check_basis

RANK = 4
HALF, BRAIN, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64


def weights(dtype: torch.dtype, size: float, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Base and aligned weights with entries of about ``size``, four directions of displacement above the others."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=DOUBLE)

    strong = (noise(rows, RANK) * torch.tensor([4.0, 3.0, 2.0, 1.0])) @ noise(RANK, columns)
    base, displacement = noise(rows, columns), strong + 0.1 * noise(rows, columns)
    return tuple((size * weight / 20).to(dtype) for weight in (base, base + displacement))


@pytest.mark.parametrize(("method", "rows", "columns"), [("exact", 24, 40), ("krylov", 120, 90), ("krylov", 90, 120)])
@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (HALF, 1.0),
        (HALF, 1e4),
        (HALF, 1e-3),
        *((dtype, size) for dtype in (BRAIN, SINGLE, DOUBLE) for size in (1.0, 1e36, 1e30, 1e19, 1e-20, 1e-35)),
    ],
)
def test_agrees_with_a_dense_svd_whatever_the_size_of_the_weights(dtype, size, method, rows, columns):
    base, aligned = weights(dtype, size, rows, columns)
    D = aligned.double() - base.double()
    U, sigma, Vh = torch.linalg.svd(D, full_matrices=False)
    basis = basis_of("q_proj", (base, aligned), {"rank": RANK, "energy": None, "method": method, "seed": 0})
    check_basis("q_proj", basis)
    assert basis.displacement == pytest.approx(sigma.norm().item(), rel=1e-6, abs=0)
    assert basis.singular_values.tolist() == pytest.approx(sigma[:RANK].tolist(), rel=1e-5, abs=0)
    assert basis.energy == pytest.approx((sigma[:RANK].norm() / sigma.norm()).item() ** 2, rel=1e-5)
    for found, expected in ((basis.U, U[:, :RANK]), (basis.V, Vh[:RANK].T)):
        assert found.dtype == SINGLE
        found = found.double()
        torch.testing.assert_close(found.T @ found, torch.eye(RANK, dtype=DOUBLE), atol=1e-5, rtol=0)
        wrong = expected - found @ (found.T @ expected)
        assert wrong.norm() * math.sqrt(2 / min(rows, columns)) < (1e-3 if method == "krylov" else 1e-5)


def test_small_entries_beside_ordinary_ones_are_no_reason_to_refuse():
    aligned = torch.tensor([[1e-44, 1e-40], [0.5, 1e-30]])
    rule = {"rank": 2, "energy": None, "method": "exact", "seed": 0}
    basis = basis_of("q_proj", (torch.zeros(2, 2), aligned), rule)
    assert basis.displacement == 0.5
    assert basis.U.flatten().tolist() == [0.0, 1.0]
    assert basis.V.flatten().tolist() == pytest.approx([1.0, 0.0], abs=1e-29)


@pytest.mark.parametrize(
    ("dtype", "base", "aligned", "size"),
    [
        (SINGLE, -3e38, 3e38, "inf"),  # the difference overflows
        (SINGLE, 0.0, 3e38, "5e+38"),  # only its norm does
        (SINGLE, 1e-40, 2e-40, "1e-40"),
        (BRAIN, 0.0, 1e-40, "9e-41"),
        (DOUBLE, 0.0, 1e300, "1e+300"),
        (DOUBLE, 0.0, 1e-300, "1e-300"),
    ],
)
def test_a_displacement_that_float32_cannot_hold_is_refused_by_name(dtype, base, aligned, size):
    rule = {"rank": 1, "energy": None, "method": "exact", "seed": 0}
    pair = (torch.full((1, 3), value, dtype=dtype) for value in (base, aligned))
    message = f"`base`: expected a displacement W_aligned − W_base of module 'layers.3.q_proj' .* of size {size}\\."
    with pytest.raises(ValueError, match=message.replace("+", r"\+")):
        basis_of("layers.3.q_proj", pair, rule)


def good() -> Basis:
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(rows, 3, generator=generator))[0] for rows in (8, 6))
    return Basis(U, V, torch.tensor([3.0, 2.0, 1.0]), displacement=4.0)


def with_entry(tensor: Tensor, value: float) -> Tensor:
    tensor = tensor.clone()
    tensor[(-1,) * tensor.ndim] = value
    return tensor


U, V, SIGMA = good().U, good().V, good().singular_values
WRONG = {
    "U × 1000": ({"U": 1000 * U}, "expected orthonormal columns in U, but got an entry of 1e+06 in UᵀU − I"),
    "V × 1.01": ({"V": 1.01 * V}, "expected orthonormal columns in V, but got an entry of 0.02"),
    "repeated column": ({"U": U[:, [0, 0, 2]]}, "expected orthonormal columns in U, but got an entry of 1 in"),
    "zeros": ({"V": 0 * V}, "expected orthonormal columns in V"),
    "float64": ({"U": U.double()}, "expected U in float32 with 2 axes, but got torch.float64 of shape (8, 3)"),
    "bfloat16": ({"V": V.bfloat16()}, "expected V in float32 with 2 axes, but got torch.bfloat16 of shape (6, 3)"),
    "int32": ({"singular_values": SIGMA.int()}, "expected singular_values in float32 with 1 axes"),
    "complex": ({"U": U + 0j}, "expected U in float32 with 2 axes, but got torch.complex64"),
    "vector": ({"U": U[:, 0]}, "expected U in float32 with 2 axes, but got torch.float32 of shape (8,)"),
    "batch": ({"V": V[None]}, "expected V in float32 with 2 axes, but got torch.float32 of shape (1, 6, 3)"),
    "numpy": ({"U": U.numpy()}, "expected U to be a tensor, but got ndarray"),
    "column missing": ({"U": U[:, :2]}, "as many columns in U and in V as singular values, but got 2, 3 and 3"),
    "value missing": ({"singular_values": SIGMA[:2]}, "as singular values, but got 3, 3 and 2"),
    "NaN": ({"U": with_entry(U, math.nan)}, "expected finite values in U, but got NaN or Inf"),
    "Inf": ({"V": with_entry(V, math.inf)}, "expected finite values in V, but got NaN or Inf"),
    "NaN among values": (
        {"singular_values": with_entry(SIGMA, math.nan)},
        "expected finite values in singular_values",
    ),
    "negative": ({"singular_values": with_entry(SIGMA, -0.5)}, "expected singular values ≥ 0 in descending order"),
    "ascending": ({"singular_values": SIGMA.flip(0)}, "expected singular values ≥ 0 in descending order"),
    "too much": ({"displacement": 3.7}, "expected singular values of norm ‖D‖ = 3.7 at most, but got 3.74166"),
    "nothing": ({"displacement": 0.0}, "expected singular values of norm ‖D‖ = 0 at most"),
    "negative norm": ({"displacement": -4.0}, "expected a finite displacement ≥ 0, but got -4.0"),
    "norm NaN": ({"displacement": math.nan}, "expected a finite displacement ≥ 0, but got nan"),
    "norm Inf": ({"displacement": math.inf}, "expected a finite displacement ≥ 0, but got inf"),
    "norm as text": ({"displacement": "4.0"}, "expected a finite displacement ≥ 0, but got '4.0'"),
    "norm as truth": ({"displacement": True}, "expected a finite displacement ≥ 0, but got True"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_basis_is_refused_by_name(case):
    changed, message = WRONG[case]
    with pytest.raises(ValueError, match=f"^`subspace`: module 'layers.3.q_proj': .*{re.escape(message)}"):
        check_basis("layers.3.q_proj", dataclasses.replace(good(), **changed))


def test_rounding_is_not_refused():
    basis = good()
    for U, V in ((basis.U, basis.V), (1.0001 * basis.U, basis.V * 0.9999)):
        check_basis("q_proj", dataclasses.replace(basis, U=U, V=V, displacement=basis.singular_values.norm().item()))
    check_basis("q_proj", Basis(torch.zeros(8, 0), torch.zeros(6, 0), torch.zeros(0), 0.0))
    check_basis("q_proj", dataclasses.replace(basis, displacement=4))
    with pytest.raises(ValueError, match="module 'q_proj': expected a Basis, but got tuple"):
        check_basis("q_proj", (basis.U, basis.V))


def test_a_basis_is_checked_in_full_precision_wherever_that_is_asked_for():
    pair = weights(SINGLE, 1.0, 24, 40)
    basis = basis_of("q_proj", pair, {"rank": RANK, "energy": None, "method": "exact", "seed": 0})
    with torch.autocast("cpu", BRAIN), torch.device("meta"):
        check_basis("q_proj", basis)
