"""The rank that is taken where none is named: a thirty-second of each module's smaller side, at least 4."""

import json
import logging
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from csulora_callback import SafetySubspace
from csulora_callback.method.basis import rank_of
from csulora_callback.reporting.subspace import print_subspace
from csulora_callback.reporting.terminal import make_console
from tests.helpers.lab import align

# By shape (d_out, d_in): of real models' modules, and of what is small.
EXPECTED = {
    (1, 1): 1,
    (2, 7): 2,
    (3, 64): 3,
    (64, 3): 3,
    (4, 4): 4,
    (5, 9): 4,
    (64, 64): 4,
    (127, 500): 4,
    (128, 128): 4,
    (159, 159): 4,
    (160, 200): 5,
    (192, 576): 6,  # SmolLM2-135M: k_proj, v_proj
    (576, 576): 18,
    (1536, 576): 18,
    (512, 2048): 16,  # Llama-3.2-1B: k_proj, v_proj
    (2048, 2048): 64,
    (8192, 2048): 64,
    (2048, 8192): 64,
    (1024, 4096): 32,  # Llama-3.1-8B: k_proj, v_proj
    (14336, 4096): 128,
    (4096, 14336): 128,
    (128256, 4096): 128,
}
# Small enough to be estimated here: below 4, below 128, at a step, and past it.
MIXED = {"a": (3, 64), "b": (64, 2), "c": (100, 40), "d": (128, 300), "e": (191, 160), "f": (192, 576)}


def models(shapes: dict[str, tuple[int, int]] = MIXED) -> tuple[nn.Module, nn.Module]:
    """A base and an aligned model with one linear layer of each shape; never run, so that they need not fit."""
    torch.manual_seed(0)
    base = nn.ModuleDict({name: nn.Linear(d_in, d_out) for name, (d_out, d_in) in shapes.items()})
    return base, align(base, rank=64)  # displaced in many directions, and not as far as independent ones


def ranks(subspace: SafetySubspace) -> dict[str, int]:
    for basis in subspace.values():
        assert basis.U.shape[1] == basis.V.shape[1] == len(basis.singular_values)
    return {name: basis.U.shape[1] for name, basis in subspace.items()}


@pytest.mark.parametrize("shape", EXPECTED, ids=str)
def test_by_shape(shape):
    assert rank_of(shape) == EXPECTED[shape]


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.integers(1, 10**6))
def test_what_holds_for_every_shape(rows, columns, larger):
    k, smaller = rank_of((rows, columns)), min(rows, columns)
    assert 1 <= k <= smaller
    assert k == rank_of((columns, rows)) == rank_of((smaller, smaller))  # the smaller side alone decides
    if smaller >= 128:
        assert 32 * k <= smaller < 32 * (k + 1)
    else:
        assert k == 4 or k == smaller < 4
    assert rank_of((rows + larger, columns + larger)) >= k


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 5000))
def test_a_rank_that_is_named_is_absolute(rows, columns, rank):
    assert rank_of((rows, columns), rank) == min(rank, rows, columns)


def test_modules_of_mixed_shapes_each_have_their_own():
    base, aligned = models()
    subspace = SafetySubspace.estimate(base, aligned, progress=False)
    assert ranks(subspace) == {"a": 3, "b": 2, "c": 4, "d": 4, "e": 5, "f": 6}
    assert (subspace.metadata["rank"], subspace.metadata["energy"]) == (None, None)
    for name, basis in subspace.items():
        D = aligned[name].weight.detach().double() - base[name].weight.detach().double()
        U, sigma, Vh = torch.linalg.svd(D, full_matrices=False)
        k = len(basis.singular_values)
        torch.testing.assert_close(basis.singular_values.double(), sigma[:k], rtol=1e-5, atol=0)
        for found, side in ((basis.U, U[:, :k]), (basis.V, Vh[:k].T)):
            torch.testing.assert_close((found @ found.T).double(), side @ side.T, rtol=0, atol=1e-4)


def test_conv1d_has_the_rank_of_its_weight_however_that_is_stored():
    torch.manual_seed(0)
    base, aligned = (nn.Sequential(Conv1D(480, 160), Conv1D(3, 640)) for _ in range(2))
    subspace = SafetySubspace.estimate(base, aligned, progress=False)
    assert ranks(subspace) == {"0": 5, "1": 3}
    assert subspace["0"].U.shape == (160, 5)  # as stored: (d_in, d_out)


def test_equals_the_absolute_rank_where_both_are_one():
    shapes = {"a": (160, 160), "b": (170, 400), "c": (700, 191)}
    relative, absolute = (SafetySubspace.estimate(*models(shapes), rank=k, progress=False) for k in (None, 5))
    assert relative.fingerprint == absolute.fingerprint
    assert {**relative.metadata, "rank": 5} == absolute.metadata
    other = SafetySubspace.estimate(*models(), progress=False)
    assert other.fingerprint != SafetySubspace.estimate(*models(), rank=5, progress=False).fingerprint


@pytest.mark.parametrize("shape", [(2048, 512), (640, 900)])
@pytest.mark.parametrize("method", ["krylov", "exact"])
def test_large_matrices_too(shape, method):
    rule = {"method": method, "progress": False}
    relative = SafetySubspace.estimate(*models({"q": shape}), **rule)
    assert ranks(relative) == {"q": min(shape) // 32}
    absolute = SafetySubspace.estimate(*models({"q": shape}), rank=min(shape) // 32, **rule)
    assert relative.fingerprint == absolute.fingerprint


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2048, 2048), (14336, 4096)])
def test_at_the_size_of_real_models(shape):
    base, aligned = models({"q": shape})
    with torch.no_grad():  # random weights have a flat spectrum, and no leading directions to be found
        aligned["q"].weight.copy_(base["q"].weight + torch.randn(shape[0], 150) @ torch.randn(150, shape[1]))
    relative = SafetySubspace.estimate(base, aligned, progress=False)
    assert ranks(relative) == {"q": min(shape) // 32}
    absolute = SafetySubspace.estimate(base, aligned, rank=min(shape) // 32, progress=False)
    assert relative.fingerprint == absolute.fingerprint


def test_a_displacement_of_fewer_directions_has_no_more():
    base, aligned = models({"q": (200, 200)})
    with torch.no_grad():
        aligned["q"].weight.copy_(base["q"].weight + torch.randn(200, 2) @ torch.randn(2, 200))
    assert ranks(SafetySubspace.estimate(base, aligned, progress=False)) == {"q": 2}


def test_an_energy_is_not_bounded_by_it():
    subspace = SafetySubspace.estimate(*models({"q": (64, 64)}), energy=0.9, progress=False)
    assert ranks(subspace)["q"] > 4
    assert (subspace.metadata["rank"], subspace.metadata["energy"]) == (None, 0.9)


# What is kept.


def test_a_cached_subspace_of_one_rule_is_never_taken_for_that_of_another(tmp_path, caplog):
    pair = models({"a": (160, 160), "b": (170, 400)})  # 5 is what either rule gives, and still they are two

    def estimate(**rule) -> SafetySubspace:
        return SafetySubspace.estimate(*pair, progress=False, cache_dir=tmp_path, **rule)

    rules = [{}, {"rank": 5}, {"rank": 64}, {"energy": 0.5}]
    first = [estimate(**rule) for rule in rules]
    assert not any(subspace.from_cache for subspace in first)
    again = [estimate(**rule) for rule in rules]
    assert all(subspace.from_cache for subspace in again)
    assert [subspace.metadata for subspace in again] == [subspace.metadata for subspace in first]
    assert [subspace.fingerprint for subspace in again] == [subspace.fingerprint for subspace in first]
    assert len(list(tmp_path.iterdir())) == len(rules)
    assert not caplog.records


@pytest.mark.parametrize(("asked", "other"), [({}, {"rank": 64}), ({"rank": 64}, {}), ({}, {"energy": 0.5})])
def test_nor_under_its_name(tmp_path, caplog, asked, other):
    pair = models({"q": (160, 160)})
    SafetySubspace.estimate(*pair, progress=False, cache_dir=tmp_path, **other)
    (foreign,) = tmp_path.iterdir()
    truth = SafetySubspace.estimate(*pair, progress=False, cache_dir=tmp_path, **asked)
    (own,) = set(tmp_path.iterdir()) - {foreign}
    os.replace(foreign, own)
    with caplog.at_level(logging.WARNING):
        again = SafetySubspace.estimate(*pair, progress=False, cache_dir=tmp_path, **asked)
    assert not again.from_cache
    assert again.fingerprint == truth.fingerprint
    assert "of another rule" in caplog.text


@pytest.mark.parametrize("rule", [{}, {"rank": 64}, {"rank": 2}, {"energy": 0.5}], ids=str)
def test_a_saved_subspace_knows_its_rule(tmp_path, rule, capsys):
    subspace = SafetySubspace.estimate(*models(), progress=False, **rule)
    subspace.save(tmp_path / "subspace.safetensors")
    loaded = SafetySubspace.load(tmp_path / "subspace.safetensors")
    assert loaded.metadata == subspace.metadata
    assert loaded.fingerprint == subspace.fingerprint
    print_subspace(make_console(), loaded)
    (shown,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("rank "))
    expected = {
        "{}": "2–6 (asked for: a thirty-second of each module's smaller side)",
        "{'rank': 64}": "2–64 (asked for: 64)",
        "{'rank': 2}": "2 (asked for: 2)",
    }
    assert expected.get(str(rule), "(asked for: 50.0 % of the energy)") in shown


@pytest.mark.parametrize("field", ["rank", "energy"])
def test_a_rule_that_is_left_out_is_not_taken_for_the_relative_one(tmp_path, field):
    subspace = SafetySubspace.estimate(*models({"q": (8, 8)}), rank=2, progress=False)
    metadata = {key: value for key, value in json.loads(json.dumps(subspace.metadata)).items() if key != field}
    with pytest.raises(ValueError, match=rf"`subspace`: expected metadata\['{field}'\], but there is none"):
        SafetySubspace(subspace.bases, metadata).save(tmp_path / "subspace.safetensors")


# What is cut.


def test_cut_to_the_relative_rank_is_what_is_estimated_with_it():
    large, relative = (SafetySubspace.estimate(*models(), rank=k, progress=False) for k in (64, None))
    cut = large.truncated(None)
    assert cut.metadata == relative.metadata
    assert ranks(cut) == ranks(relative)
    for name in cut:
        torch.testing.assert_close(cut[name].U, relative[name].U, rtol=0, atol=1e-6)
    assert ranks(relative.truncated(1)) == dict.fromkeys(MIXED, 1)


@pytest.mark.parametrize(
    ("held", "asked", "message"),
    [
        ({}, 5, "expected at most the 4 that module 'c' was estimated with, but got 5"),
        ({"rank": 3}, 4, "expected at most the 3 that module 'c' was estimated with, but got 4"),
        ({"rank": 3}, None, "expected at most the 3 that module 'c' was estimated with, but got 4"),
        ({"rank": 5}, None, "expected at most the 5 that module 'f' was estimated with, but got 6"),
    ],
)
def test_there_is_no_cutting_to_more_than_was_estimated(held, asked, message):
    subspace = SafetySubspace.estimate(*models(), progress=False, **held)
    with pytest.raises(ValueError, match=f"^`rank`: {message}. Estimate it again."):
        subspace.truncated(asked)
