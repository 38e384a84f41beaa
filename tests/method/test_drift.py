"""What a person reads of a drift, over several modules, agrees with dense float64 references."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from csulora_callback import Penalty, SafetyDrift, correct
from csulora_callback.method.basis import Basis
from csulora_callback.method.drift import DRIFT_KEYS
from csulora_callback.method.token_space import input_gain
from tests.helpers.updates import DOUBLE, Update, make_update, presets, projectors, updates

KEYS = {
    *("csulora/aligned_energy", "csulora/partial_energy", "csulora/off_energy"),
    *("csulora/aligned_over_chance", "csulora/partial_over_chance", "csulora/off_over_chance"),
    *("csulora/alignment_undone", "csulora/alignment_undone_corrected"),
    *("csulora/attenuation", "csulora/relative_change", "csulora/truncation_error", "csulora/update_norm"),
}


def with_basis(update: Update, seed: int = 0) -> tuple[Update, Basis]:
    """The update in a subspace with as many columns on both sides, and singular values of it."""
    k = min(update.U.shape[1], update.V.shape[1])
    U, V = update.U[:, :k], update.V[:, :k]
    sigma = 3 * torch.rand(k, generator=torch.Generator().manual_seed(seed)).sort(descending=True).values
    return update._replace(U=U, V=V), Basis(U.float(), V.float(), sigma, displacement=10.0)


def drift_of(done: list) -> dict[str, float]:
    drift = SafetyDrift()
    for correction, basis in done:
        drift.update(correction, basis)
    return drift.compute()


def close(value: float, expected: float, size: float = 1.0) -> bool:
    return math.isclose(value, expected, rel_tol=1e-6, abs_tol=1e-9 * size)


@given(st.lists(st.tuples(updates(DOUBLE), st.integers(0, 2**31)), min_size=1, max_size=3), presets(), st.booleans())
@settings(max_examples=100, deadline=None)
def test_the_readable_signal_is_that_of_dense_matrices(made, preset, data_aware):
    modules = [with_basis(update, seed) for update, seed in made]
    done = []
    for update, basis in modules:
        if data_aware:
            tokens = torch.randn(6, update.A.shape[1], generator=torch.Generator().manual_seed(1))
            gain = input_gain(tokens[:3], tokens[3:], strength=3.0)
            penalty = Penalty.data_aware(3.0)
            result = correct(update.A, update.B, update.U, update.V, penalty, update.scaling, input_gain=gain)
        else:
            result = update.correct(preset)
        done.append((update, result, basis))
    seen = drift_of([(result, basis) for _, result, basis in done])
    assert set(seen) == KEYS

    D = [update.U * basis.singular_values.double() @ update.V.T for update, _, basis in done]
    kept = sum(part.square().sum().item() for part in D)
    for key, matrices in (
        ("csulora/alignment_undone", [update.delta for update, _, _ in done]),
        ("csulora/alignment_undone_corrected", [update.of(result) for update, result, _ in done]),
    ):
        along = sum((matrix * part).sum().item() for matrix, part in zip(matrices, D, strict=True))
        size = sum(matrix.norm().item() * part.norm().item() for matrix, part in zip(matrices, D, strict=True))
        size += 1e-6 * sum(update.delta.norm().item() for update, _, _ in done)  # X may be nothing but rounding
        assert close(seen[key], -along / kept if kept else 0.0, size / kept if kept else 0.0), key

    energy, chance = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for update, _, _ in done:
        whole = update.delta.square().sum()
        for i, (left, right) in enumerate(projectors(update)):
            energy[i] += (left @ update.delta @ right).square().sum()
            chance[i] += whole * (left.trace() * right.trace()) / update.delta.numel()  # the share of the dimensions
    for key, blocks in (("aligned", [0]), ("partial", [1, 2]), ("off", [3])):
        by_chance = chance[blocks].sum().item()
        if by_chance > 1e-9 * chance.sum():  # a block without dimensions is 0 only to rounding when it is dense
            expected = energy[blocks].sum().item() / by_chance
            assert close(seen[f"csulora/{key}_over_chance"], expected, energy.sum().item() / by_chance), key


@pytest.mark.parametrize("sides", [(0, 0), (8, 8)])
def test_over_a_chance_of_nothing_there_is_no_ratio(sides):
    """No subspace, or one that is the whole space: there is one block, and it has what chance gives it."""
    update, basis = with_basis(make_update(8, 8, 2, *sides))
    seen = drift_of([(update.correct(("csulora", (10.0,))), basis)])
    over = [seen[f"csulora/{block}_over_chance"] for block in ("aligned", "partial", "off")]
    assert over == pytest.approx([0.0, 0.0, 1.0] if sides == (0, 0) else [1.0, 0.0, 0.0])
    assert all(map(math.isfinite, seen.values()))
    if sides == (0, 0):
        assert seen["csulora/alignment_undone"] == seen["csulora/alignment_undone_corrected"] == 0.0


def test_random_updates_lie_where_chance_puts_them_and_undo_nothing():
    modules = [with_basis(make_update(24, 16, 3, 6, 6, seed=seed)) for seed in range(400)]
    seen = drift_of([(update.correct(("guard", (1.0,))), basis) for update, basis in modules])
    for block in ("aligned", "partial", "off"):
        assert math.isclose(seen[f"csulora/{block}_over_chance"], 1.0, abs_tol=0.05), block
    assert abs(seen["csulora/alignment_undone"]) < 0.1


def test_the_sizes_of_modules_weigh_what_chance_gives():
    """A large update in a module whose subspace is all of it, beside a small one in a module with next to none."""
    large, wide = with_basis(make_update(8, 8, 2, 8, 8, scaling=10.0))
    small, narrow = with_basis(make_update(8, 8, 2, 1, 1, scaling=0.001, seed=1))
    seen = drift_of([(u.correct(("guard", (1.0,))), basis) for u, basis in ((large, wide), (small, narrow))])
    assert math.isclose(seen["csulora/aligned_over_chance"], 1.0, rel_tol=1e-4)


def test_nothing_is_no_drift():
    update, basis = with_basis(make_update(8, 8, 2, 2, 2))
    update = update._replace(B=torch.zeros_like(update.B))
    assert drift_of([(update.correct(("csulora", (10.0,))), basis)]) == dict.fromkeys(KEYS, 0.0)
    assert set(DRIFT_KEYS) == KEYS
