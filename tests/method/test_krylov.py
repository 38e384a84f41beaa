"""The block Krylov space against exact singular value decompositions, by what a correction makes of the difference."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from csulora_callback import Penalty, correct
from csulora_callback.method import krylov
from csulora_callback.method.singular import leading_singular_triplets

DOUBLE = torch.float64
SPECTRA = {
    "power law 0.5": lambda i: i**-0.5,
    "power law 1": lambda i: i**-1.0,
    "power law 2": lambda i: i**-2.0,
    "exponential": lambda i: 0.97**i,
    "linear": lambda i: 1.0 - (i - 1) / (len(i) + 10),
    "low rank": lambda i: (i <= 30).double(),
    "plateau above a power law": lambda i: torch.where(i <= 20, 1.0, 0.5 * i**-0.5),
    "close ones above a power law": lambda i: torch.where(i <= 20, 1.0 - 1e-4 * i, 0.5 * i**-0.5),
}


def random(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def displacement(rows: int, columns: int, spectrum: str, noise: float, seed: int) -> Tensor:
    """Of norm one, in float32."""
    smaller = min(rows, columns)
    left, right = (torch.linalg.qr(random(side, smaller, seed + i))[0] for i, side in enumerate((rows, columns)))
    D = (left * SPECTRA[spectrum](torch.arange(1, smaller + 1, dtype=DOUBLE))) @ right.T
    disturbed = D / D.norm() + noise * random(rows, columns, seed + 2) / math.sqrt(rows * columns)
    return (disturbed / disturbed.norm()).float()


def rule(rank: int | None = None, energy: float | None = None, method: str = "krylov") -> dict:
    return {"rank": rank, "energy": energy, "method": method, "seed": 0}


def error_of_the_correction(
    found: tuple[Tensor, ...], exact: tuple[Tensor, ...], penalty: Penalty, seed: int
) -> float:
    """``‖X̂* − X*‖ / ‖Δ‖`` of an update of rank 8, half of it along the displacement's leading directions."""
    (U, _, V), (exact_U, _, exact_Vh) = found, exact
    k = U.shape[1]
    B, A = random(len(U), 8, seed) / math.sqrt(len(U)), random(8, len(V), seed + 1) / math.sqrt(len(V))
    B[:, : min(4, k)] += exact_U[:, : min(4, k)]
    A[: min(4, k)] += exact_Vh[: min(4, k)]
    X, reference = (
        (result.lora_B @ result.lora_A)
        for result in (
            correct(A, B, U.double(), V.double(), penalty, rank="expand"),
            correct(A, B, exact_U[:, :k], exact_Vh[:k].T, penalty, rank="expand"),
        )
    )
    return ((X - reference).norm() / (B @ A).norm()).item()


@settings(derandomize=True, deadline=None, max_examples=25)
@given(
    spectrum=st.sampled_from(sorted(SPECTRA)),
    noise=st.sampled_from([0.0, 0.1, 0.5, 2.0]),
    shape=st.sampled_from([(400, 300), (300, 400), (320, 320)]),
    rank=st.integers(1, 35),
    seed=st.integers(0, 1000),
)
def test_corrections_are_those_of_the_exact_subspace(spectrum, noise, shape, rank, seed):
    D = displacement(*shape, spectrum, noise, seed)
    exact = torch.linalg.svd(D.double(), full_matrices=False)
    found = leading_singular_triplets("q_proj", D, rule(rank))
    k, sigma = found[0].shape[1], exact[1]
    assert k == rank or (noise == 0.0 and spectrum == "low rank")
    lost = 1 - (found[1].double().square().sum() / sigma[:k].square().sum()).item()
    assert abs(lost) < 2e-6
    for side in (found[0], found[2]):
        torch.testing.assert_close(side.T @ side, torch.eye(k), atol=1e-4, rtol=0)
    # Between equal singular values there is no subspace to find, and any basis of them keeps the same energy.
    if k == len(sigma) or sigma[k - 1] - sigma[k] > 1e-5 * sigma[0]:
        for penalty in (Penalty.guard(10.0), Penalty.csulora(10.0)):
            assert error_of_the_correction(found, exact, penalty, seed) < 1e-3


@settings(derandomize=True, deadline=None, max_examples=15)
@given(
    spectrum=st.sampled_from(sorted(SPECTRA)),
    noise=st.sampled_from([0.0, 0.5]),
    share=st.floats(0.05, 0.95),
    seed=st.integers(0, 1000),
)
def test_an_energy_gets_the_smallest_rank_that_holds_it(spectrum, noise, share, seed):
    D = displacement(400, 300, spectrum, noise, seed)
    sigma = torch.linalg.svdvals(D.double())
    smallest = int((sigma.square().cumsum(0) < share).sum()) + 1
    found = leading_singular_triplets("q_proj", D, rule(energy=share))
    kept = found[1].double().square().sum().item()
    assert kept >= share - 1e-5
    assert len(found[1]) == smallest or sigma[:smallest].square().sum().item() == pytest.approx(share, abs=1e-5)


@pytest.mark.parametrize("spectrum", sorted(SPECTRA))
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_what_is_said_of_the_error_is_about_right(spectrum, noise):
    D, rank = displacement(400, 300, spectrum, noise, seed=0), 16
    _, sigma, Vh = torch.linalg.svd(D.double(), full_matrices=False)
    if sigma[rank - 1] < 1.001 * sigma[rank]:
        return  # nothing to be wrong about
    space = krylov._Space(D, 8, torch.Generator().manual_seed(0))
    said, true = [], []
    while space.size <= space.limit:
        space.grow()
        if space.size < 2 * rank:
            continue
        values, vectors = space.ritz()
        V = space.triplets(values, vectors, rank)[2].double()
        said.append(space.error(values, vectors, rank))
        true.append(math.sqrt(max(0.0, 1 - (Vh[:rank] @ V).square().sum().item() / rank)))
    compared = [(one, other) for one, other in zip(said, true, strict=True) if 3e-4 < other < 0.1]
    assert compared
    assert all(other < 3 * one for one, other in compared)
    if sigma[rank - 1] > 1.005 * sigma[rank]:  # it errs to the safe side where the rank cuts through a cluster
        assert min(one / other for one, other in compared) < 3


def test_more_equal_singular_values_than_a_block_is_wide_are_all_found():
    """A space that grows from eight directions has no more of the twenty at first, and cannot tell."""
    D = displacement(400, 300, "plateau above a power law", 0.0, seed=0)
    exact = torch.linalg.svdvals(D.double())[:24]
    space = krylov._Space(D, 8, torch.Generator().manual_seed(0))
    while space.size < 56:
        space.grow()
    values, vectors = space.ritz()
    assert (values > 0.999 * exact[19]).sum() < 20
    assert space.misses(*space.triplets(values, vectors, 24)[:2], torch.Generator().manual_seed(1))
    found = leading_singular_triplets("q_proj", D, rule(24))[1]
    assert found.tolist() == pytest.approx(exact.tolist(), rel=1e-4)


def test_neither_the_global_generator_nor_the_matrix_is_touched():
    D = displacement(400, 300, "power law 1", 0.5, seed=0)
    before, state = D.clone(), torch.random.get_rng_state()
    first, second = (leading_singular_triplets("q_proj", D, rule(16)) for _ in range(2))
    assert torch.equal(D, before)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("rank", [16, 64])
@pytest.mark.parametrize("directions", [1, 3, 20, 40])
def test_a_displacement_of_low_rank_needs_no_exact_decomposition(directions, rank, monkeypatch):
    """Such as that of an adapter that was merged: beyond it there is rounding, which is no direction."""
    D = random(700, directions, 0) @ random(directions, 600, 1)
    D = (D / D.norm()).float()
    exact = torch.linalg.svdvals(D.double())[: min(rank, directions)]
    monkeypatch.setattr(torch.linalg, "svd", None)
    U, sigma, V = leading_singular_triplets("q_proj", D, rule(rank))
    assert sigma.tolist() == pytest.approx(exact.tolist(), rel=1e-5)
    for side in (U, V):
        torch.testing.assert_close(side.T @ side, torch.eye(len(sigma)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("rank", [16, 64])
def test_singular_values_that_no_gram_matrix_can_tell_are_those_of_an_exact_decomposition(rank):
    """In float64 there are more of them: the rounding of weights that were float32 once is a direction."""
    D = (random(700, 3, 0) @ random(3, 600, 1)).float().double()
    D /= D.norm()
    exact = torch.linalg.svdvals(D)[:rank]
    assert 1e-9 < exact[-1] < 1e-6
    U, sigma, V = leading_singular_triplets("q_proj", D, rule(rank))
    assert sigma.tolist() == pytest.approx(exact.tolist(), rel=1e-5)
    for side in (U, V):
        torch.testing.assert_close(side.T @ side, torch.eye(rank, dtype=DOUBLE), atol=1e-9, rtol=0)
