"""What is measured from small products agrees with dense float64 references."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from csulora_callback.method.basis import Basis, basis_of
from csulora_callback.method.measure import (
    Drift,
    along_displacement,
    block_energies,
    chance_shares,
    measure,
    measure_kept,
    total,
)
from tests.helpers.updates import BLOCKS, DOUBLE, SINGLE, make_update, projectors, updates

RULE = {"rank": 3, "energy": None, "method": "exact", "seed": 0}


def displacement(d_out: int, d_in: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(updates(DOUBLE))
@settings(max_examples=200, deadline=None)
def test_energies_are_those_of_the_dense_blocks(update):
    energy = block_energies(*update)
    whole = update.delta.square().sum().item()
    for block, (left, right) in zip(BLOCKS, projectors(update), strict=True):
        dense = (left @ update.delta @ right).square().sum().item()
        assert math.isclose(energy[block], dense, rel_tol=1e-9, abs_tol=1e-12 * whole), block
        assert energy[block] >= 0.0


@given(updates(SINGLE))
@settings(max_examples=100, deadline=None)
def test_energies_are_those_that_a_correction_measures(update):
    energy, correction = block_energies(*update), update.correct(("csulora", (1.0,)))
    whole = sum(correction.energy.values())
    for block in BLOCKS:
        assert math.isclose(energy[block], correction.energy[block], rel_tol=1e-6, abs_tol=1e-6 * whole), block


@given(updates(DOUBLE), st.integers(0, 2**31))
@settings(max_examples=100, deadline=None)
def test_the_way_an_update_points_is_that_of_the_dense_product(update, seed):
    D = displacement(*update.delta.shape, seed)
    exact = (update.delta * D).sum().item()
    size = update.delta.norm().item() * D.norm().item()
    assert math.isclose(along_displacement(update.A, update.B, D, update.scaling), exact, abs_tol=1e-12 * size)
    k = min(update.U.shape[1], update.V.shape[1])
    U, V, sigma = update.U[:, :k], update.V[:, :k], torch.rand(k, dtype=torch.float64)
    kept = (update.delta * (U * sigma @ V.T)).sum().item()
    found = measure_kept(update.A, update.B, U, V, Basis(U, V, sigma, 1.0), update.scaling).along
    assert math.isclose(found, kept, abs_tol=1e-12 * size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_of_any_dtype_point_the_same_way(dtype):
    update, D = make_update(40, 30, 4, 3, 3), displacement(40, 30).to(dtype)
    exact = (update.delta * D.double()).sum().item()
    size = update.delta.norm().item() * D.double().norm().item()
    assert math.isclose(along_displacement(update.A, update.B, D), exact, abs_tol=1e-6 * size)


@pytest.mark.parametrize("sides", [((12, 3), (9, 2)), ((12, 0), (9, 0)), ((5, 5), (7, 2))])
def test_chance_is_what_random_updates_have(sides):
    (d_out, k_out), (d_in, k_in) = sides
    chance = chance_shares(*sides)
    assert math.isclose(sum(chance.values()), 1.0)
    many = [make_update(d_out, d_in, 4, k_out, k_in, seed=seed) for seed in range(400)]
    energies = [block_energies(*update) for update in many]
    whole = sum(sum(energy.values()) for energy in energies)
    for block in BLOCKS:
        assert math.isclose(sum(energy[block] for energy in energies) / whole, chance[block], abs_tol=0.02), block


def test_an_update_that_takes_the_alignment_back_undoes_all_of_it():
    base, aligned = displacement(20, 16, 1), displacement(20, 16, 2)
    D = aligned - base
    basis = basis_of("q_proj", (base, aligned), RULE)
    left, sigma, right = torch.linalg.svd(D, full_matrices=False)
    A, B = right, -left * sigma  # B·A = −D
    exact = along_displacement(A, B, D)
    assert math.isclose(-exact / D.square().sum().item(), 1.0, rel_tol=1e-9)
    drift = measure_kept(A, B, basis.U, basis.V, basis)
    assert math.isclose(drift.undone, 1.0, rel_tol=1e-5)
    assert math.isclose(drift.shares["aligned"], basis.energy, rel_tol=1e-5)


def test_several_modules_together_are_weighted_by_their_size():
    small, large = (make_update(16, 16, 2, k, k, seed=k) for k in (2, 8))
    large = large._replace(scaling=10.0)
    drifts = [measure(*update[:4], along=1.0, displacement=2.0, scaling=update.scaling) for update in (small, large)]
    together = total(drifts)
    whole = sum(update.delta.square().sum().item() for update in (small, large))
    assert math.isclose(together.total_energy, whole, rel_tol=1e-6)
    assert math.isclose(together.chance["aligned"], 0.25, rel_tol=0.05)  # nearly that of the large one
    assert together.undone == -0.5


def test_nothing_is_no_drift():
    update = make_update(8, 8, 2, 2, 2)
    drift = measure(update.A, torch.zeros_like(update.B), update.U, update.V, along=0.0, displacement=1.0)
    assert drift.shares == drift.chance == dict.fromkeys(BLOCKS, 0.0)
    assert drift.undone == Drift().undone == total([]).undone == 0.0
