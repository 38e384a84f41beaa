"""The subspace against dense SVDs, and what it refuses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from csulora_callback import SafetySubspace
from csulora_callback.method.basis import Basis
from tests.helpers.lab import TARGETS, align, tiny_llama


def pair_with_displacement(D: torch.Tensor, dtype=torch.float32) -> tuple[nn.Module, nn.Module]:
    """Two one-layer models whose weights differ by ``D``."""
    base = nn.Sequential(nn.Linear(D.shape[1], D.shape[0], bias=False)).to(dtype)
    aligned = nn.Sequential(nn.Linear(D.shape[1], D.shape[0], bias=False)).to(dtype)
    with torch.no_grad():
        base[0].weight.zero_()
        aligned[0].weight.copy_(D)
    return base, aligned


def displacement(rows: int, columns: int, spectrum: torch.Tensor, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(rows, len(spectrum), generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(columns, len(spectrum), generator=generator, dtype=torch.float64))[0]
    return (left * spectrum.double()) @ right.T


def subspace_error(basis: torch.Tensor, reference: torch.Tensor) -> float:
    """What an update in no special direction is split wrongly by: ``‖P − P̂‖_F / √d``."""
    basis, reference = basis.double(), reference.double()
    return (reference - basis @ (basis.T @ reference)).norm().item() * (2 / len(basis)) ** 0.5


def assert_leading(basis: Basis, D: torch.Tensor, k: int, tolerance: float) -> None:
    U, sigma, Vh = torch.linalg.svd(D.double(), full_matrices=False)
    assert basis.U.shape == (D.shape[0], k)
    assert basis.V.shape == (D.shape[1], k)
    assert subspace_error(basis.U, U[:, :k]) < tolerance
    assert subspace_error(basis.V, Vh[:k].T) < tolerance
    torch.testing.assert_close(basis.singular_values.double(), sigma[:k], rtol=1e-4, atol=1e-6 * sigma[0].item())
    for side in (basis.U, basis.V):
        torch.testing.assert_close(side.T @ side, torch.eye(k), atol=1e-5, rtol=0)
    assert basis.energy == pytest.approx((sigma[:k].square().sum() / sigma.square().sum()).item(), abs=1e-4)
    assert basis.displacement == pytest.approx(sigma.norm().item(), rel=1e-5)


SPECTRA = {
    "gap": lambda n: torch.cat([torch.linspace(2, 1, 16), 0.05 * torch.ones(n - 16)]),
    "power law": lambda n: torch.arange(1, n + 1) ** -1.0,
    "slow power law": lambda n: torch.arange(1, n + 1) ** -0.5,
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(("rows", "columns"), [(640, 800), (800, 640)])
def test_krylov_finds_the_leading_subspace(spectrum, rows, columns):
    D = displacement(rows, columns, SPECTRA[spectrum](640))
    subspace = SafetySubspace.estimate(*pair_with_displacement(D), rank=16, method="krylov", progress=False)
    assert_leading(subspace["0"], D, 16, tolerance=1e-3)
    exact = SafetySubspace.estimate(*pair_with_displacement(D), rank=16, method="exact", progress=False)
    assert_leading(exact["0"], D, 16, tolerance=1e-5)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 20),
    rank=st.integers(1, 30),
    seed=st.integers(0, 10),
)
def test_small_matrices_of_any_shape(rows, columns, rank, seed):
    spectrum = torch.linspace(2, 1, min(rows, columns))
    D = displacement(rows, columns, spectrum, seed)
    basis = SafetySubspace.estimate(*pair_with_displacement(D), rank=rank, progress=False)["0"]
    k = min(rank, rows, columns)
    separated = k == len(spectrum) or len(spectrum) < 2
    gap = 1.0 if separated else (spectrum[k - 1] - spectrum[k]).item()
    assert_leading(basis, D, k, tolerance=1e-5 / gap)


@pytest.mark.parametrize("method", ["krylov", "exact"])
@pytest.mark.parametrize("share", [0.3, 0.9, 0.99, 1.0])
def test_energy_keeps_the_smallest_rank_that_holds_it(method, share):
    spectrum = torch.arange(1, 641) ** -1.0
    D = displacement(640, 700, spectrum)
    basis = SafetySubspace.estimate(*pair_with_displacement(D), energy=share, method=method, progress=False)["0"]
    kept = spectrum.double().square().cumsum(0) / spectrum.double().square().sum()
    smallest = int((kept < share - 1e-6).sum()) + 1
    assert basis.U.shape[1] == pytest.approx(smallest, abs=0 if share < 1 else 40)
    assert basis.energy >= share - 1e-4
    if share < 1:
        assert_leading(basis, D, smallest, tolerance=1e-3)


def test_rank_never_exceeds_that_of_the_displacement():
    D = displacement(64, 48, torch.tensor([3.0, 2.0, 1.0]))
    basis = SafetySubspace.estimate(*pair_with_displacement(D), rank=10, progress=False)["0"]
    assert_leading(basis, D, 3, tolerance=1e-5)


def test_what_is_cut_says_its_own_rank():
    base, aligned = nn.Sequential(nn.Linear(8, 6)), nn.Sequential(nn.Linear(8, 6))
    whole = SafetySubspace.estimate(base, aligned, energy=0.9, progress=False)
    cut, small = whole.truncated(2), SafetySubspace.estimate(base, aligned, rank=2, progress=False)
    assert {**cut.metadata, "rank": 2, "energy": None} == cut.metadata == small.metadata


def test_all_energy_of_a_low_rank_displacement_needs_no_more_than_its_rank():
    D = displacement(64, 48, torch.tensor([3.0, 2.0, 1.0]))
    basis = SafetySubspace.estimate(*pair_with_displacement(D), energy=1.0, progress=False)["0"]
    assert_leading(basis, D, 3, tolerance=1e-5)


def test_norm_of_a_large_displacement_is_accurate():
    """One float32 sum over all squares is wrong by 1e-4 at this size, and an energy with it."""
    D = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0))
    basis = SafetySubspace.estimate(*pair_with_displacement(D), rank=1, progress=False)["0"]
    assert basis.displacement == pytest.approx(D.double().norm().item(), rel=1e-6)


def test_sixteen_bit_weights_are_subtracted_in_float32(tmp_path):
    base = tiny_llama().to(torch.bfloat16)
    aligned = align(base)
    subspace = SafetySubspace.estimate(base, aligned, TARGETS, rank=3, progress=False)
    for name, basis in subspace.items():
        D = aligned.get_submodule(name).weight.double() - base.get_submodule(name).weight.double()
        assert_leading(basis, D, 3, tolerance=1e-4)


def test_estimate_is_deterministic_and_leaves_the_global_generator_alone(monkeypatch):
    D = displacement(640, 640, torch.arange(1, 641) ** -0.7)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = SafetySubspace.estimate(*pair_with_displacement(D), method="krylov", rank=8, progress=False)
    torch.set_rng_state(before)
    pair = pair_with_displacement(D)  # draws, as building a layer does
    state = torch.get_rng_state()
    again = SafetySubspace.estimate(*pair, method="krylov", rank=8, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.fingerprint == again.fingerprint
    other = SafetySubspace.estimate(*pair, method="krylov", rank=8, seed=1, progress=False)
    assert other.fingerprint != first.fingerprint
    assert subspace_error(first["0"].U, other["0"].U) < 1e-3


def test_a_module_that_did_not_move_has_an_empty_basis():
    base, aligned = tiny_llama(), align(tiny_llama())
    name = "model.layers.0.self_attn.q_proj"
    aligned.get_submodule(name).load_state_dict(base.get_submodule(name).state_dict())
    subspace = SafetySubspace.estimate(base, aligned, TARGETS, rank=2, progress=False)
    assert subspace[name].U.shape == (16, 0)
    assert subspace[name].energy == 1.0
    total = sum(basis.displacement**2 for basis in subspace.values())
    kept = sum(basis.singular_values.square().sum().item() for basis in subspace.values())
    assert subspace.energy_kept == pytest.approx(kept / total, rel=1e-5)


def test_result_depends_on_neither_order_nor_number_of_modules():
    base, aligned = tiny_llama(), align(tiny_llama())
    few, more = (
        SafetySubspace.estimate(base, aligned, targets, rank=2, method="krylov", progress=False)
        for targets in (["v_proj"], TARGETS[::-1])
    )
    assert all(torch.equal(few[name].U, more[name].U) for name in few)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "`rank`: expected a whole number ≥ 1 or None, but got 0"),
        ({"rank": 2.5}, "`rank`: expected a whole number ≥ 1 or None, but got 2.5"),
        ({"energy": 1.5}, r"`energy`: expected a share in \(0, 1\] or None, but got 1.5"),
        ({"method": "svd"}, "`method`: expected 'auto', 'krylov' or 'exact', but got 'svd'"),
        ({"target_modules": "nothing"}, "expected a module whose name matches 'nothing', but found none"),
        ({"target_modules": ["model.norm"]}, "expected two-dimensional weights, but that of 'model.norm'"),
        ({"target_modules": ["q_prj"]}, "expected a weight for the module 'q_prj'"),
    ],
)
def test_arguments_out_of_range_are_refused(pair, arguments, message):
    with pytest.raises(ValueError, match=message):
        SafetySubspace.estimate(*pair, progress=False, **arguments)


def test_checkpoints_that_do_not_fit_are_refused(pair):
    with pytest.raises(ValueError, match=r"base equal to aligned, no displacement: none of the 6 target modules"):
        SafetySubspace.estimate(pair[0], pair[0], TARGETS, progress=False)
    wider = align(tiny_llama(intermediate_size=32))
    with pytest.raises(
        ValueError, match=r"'model\.layers\.0\.mlp\.down_proj\.weight' is \(16, 24\) in .* and \(16, 32\)"
    ):
        SafetySubspace.estimate(pair[0], wider, TARGETS, progress=False)
    deeper = align(tiny_llama(num_hidden_layers=3))
    with pytest.raises(ValueError, match=r"expected a weight for the module 'model\.layers\.2.*nearest names"):
        SafetySubspace.estimate(pair[0], deeper, TARGETS, progress=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_how_far_apart_the_checkpoints_are(dtype, tmp_path, caplog):
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(300, 40, generator=generator).to(dtype)
    for size in (0.01, 0.5):
        base, aligned = pair_with_displacement(W, dtype)
        base[0].weight.data = W - (size * torch.randn(300, 40, generator=generator)).to(dtype)
        apart = [(aligned[0].weight - base[0].weight).double().norm().item(), W.double().norm().item()]
        for _ in range(2):  # estimated, and then out of the cache
            found = SafetySubspace.estimate(base, aligned, rank=2, progress=False, cache_dir=tmp_path)
            assert found.displaced == pytest.approx(apart[0] / apart[1], rel=1e-3)
    assert not caplog.records
    found.save(tmp_path / "subspace.safetensors")
    assert SafetySubspace.load(tmp_path / "subspace.safetensors").displaced == found.displaced


def test_checkpoints_that_have_nothing_to_do_with_each_other_are_warned_of(tmp_path, caplog):
    torch.manual_seed(0)
    pair = [nn.Sequential(nn.Linear(40, 40)) for _ in range(2)]
    for times in (1, 2):  # estimated, and then out of the cache
        found = SafetySubspace.estimate(*pair, rank=2, progress=False, cache_dir=tmp_path)
        assert found.displaced == pytest.approx(2**0.5, rel=0.05)
        assert len(caplog.records) == times
    assert "Sequential in memory is 14" in caplog.text
    assert "Is it what the aligned model was made from?" in caplog.text
    found.save(tmp_path / "subspace.safetensors")
    SafetySubspace.load(tmp_path / "subspace.safetensors")
    assert len(caplog.records) == 3


def test_where_the_size_of_the_weights_is_beyond_their_dtype_the_distance_is_not_known(tmp_path):
    base, aligned = (nn.Sequential(nn.Linear(8, 6, bias=False)) for _ in range(2))
    aligned[0].weight.data *= 1e30
    found = SafetySubspace.estimate(base, aligned, rank=2, progress=False)
    assert found.displaced is None
    found.save(tmp_path / "subspace.safetensors")
    assert SafetySubspace.load(tmp_path / "subspace.safetensors").displaced is None
