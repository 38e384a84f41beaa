"""Baselines against dense float64 references."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from csulora_callback import Penalty
from csulora_callback.method.token_space import RIDGE
from csulora_callback.models.activations import Activations, Texts
from recipes.evidence.baselines import (
    Update,
    corrections,
    random_bases,
    relative_change,
    safe_lora,
    scaled_by_module,
    scaled_to_norm,
    shuffled_bases,
    shuffled_vectors,
    uniformly_scaled,
    with_noise,
)
from recipes.evidence.methods import METHODS

SHAPES = {"a": (12, 10), "b": (12, 10), "c": (12, 10), "d": (9, 14), "e": (9, 14)}


def make_update(seed: int = 0, rank: int = 3, dtype: torch.dtype = torch.float64) -> Update:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    factors = {n: (draw(rank, d_in).to(dtype), draw(d_out, rank).to(dtype)) for n, (d_out, d_in) in SHAPES.items()}
    displacement = {name: draw(*shape) * (i + 1) for i, (name, shape) in enumerate(SHAPES.items())}
    bases = {}
    for name, D in displacement.items():
        U, _, Vt = torch.linalg.svd(D, full_matrices=False)
        bases[name] = (U[:, :6], Vt[:6].T)
    scaling = {name: 0.5 + i for i, name in enumerate(SHAPES)}
    task, probes = ({name: draw(30, d_in) for name, (_, d_in) in SHAPES.items()} for _ in range(2))
    return Update(factors, scaling, bases, displacement.__getitem__, Activations(task, probes, Texts([], [], 0)))


def dense(update: Update, factors: dict | None = None) -> dict[str, torch.Tensor]:
    factors = update.factors if factors is None else factors
    return {name: update.scaling[name] * B.double() @ A.double() for name, (A, B) in factors.items()}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def apply(method: str, update: Update, strength: float = 2.0, rank: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    return dense(update, METHODS[method].apply(update, strength, rank, generator(seed)))


def projectors(update: Update, name: str, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    U, _, Vt = torch.linalg.svd(update.displacement(name))
    return U[:, :rank] @ U[:, :rank].T, Vt[:rank].T @ Vt[:rank]


APPLIED = [name for name, method in METHODS.items() if method.apply is not None]


@pytest.mark.parametrize("method", APPLIED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_method_keeps_shapes_and_dtype_and_leaves_the_raw_factors_alone(method, dtype):
    update = make_update(dtype=dtype)
    before = {name: (A.clone(), B.clone()) for name, (A, B) in update.factors.items()}
    factors = METHODS[method].apply(update, 2.0, 4, generator())
    assert list(factors) == list(update.factors)
    for name, pair in factors.items():
        for new, raw, kept in zip(pair, update.factors[name], before[name], strict=True):
            assert new.shape == raw.shape
            assert new.dtype == dtype
            assert new.data_ptr() != raw.data_ptr()
            assert torch.equal(raw, kept)


@pytest.mark.parametrize("method", APPLIED)
def test_a_method_is_random_only_where_it_says_so(method):
    first, again, *others = (apply(method, make_update(), seed=seed) for seed in (0, 0, 1, 2, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    differs = any(not torch.equal(first[name], other[name]) for other in others for name in first)
    assert differs == METHODS[method].draws


def test_the_ends_and_the_scaling_curve():
    update = make_update()
    raw = dense(update)
    for name in raw:
        torch.testing.assert_close(apply("none", update)[name], raw[name])
        torch.testing.assert_close(apply("aligned", update)[name], torch.zeros_like(raw[name]))
        torch.testing.assert_close(dense(update, uniformly_scaled(update, 4.0))[name], raw[name] / 4)


def data_aware_by_hand(delta, task, probes, strength, ridge):
    """``Δ C_T (C_T + λ C_H)⁻¹``, dense."""
    identity = torch.eye(delta.shape[1], dtype=torch.float64)
    C_T, C_H = (len(C) * C / C.trace() for C in (task.T @ task, probes.T @ probes))
    C_T = (C_T + ridge * identity) / (1.0 + ridge)
    return delta @ C_T @ torch.linalg.inv(C_T + strength * C_H)


@pytest.mark.parametrize("strength", [0.1, 3.0, 100.0])
def test_data_aware_methods_and_their_controls_are_what_their_names_say(strength):
    update = make_update()
    task, probes = update.activations.task, update.activations.probes
    unit = {name: torch.eye(d_in, dtype=torch.float64) for name, (_, d_in) in SHAPES.items()}
    for name, delta in dense(update).items():
        for method, seen in (
            ("data_aware", (task[name], probes[name])),
            ("data_aware_loose", (task[name], probes[name])),
            ("data_aware_tight", (task[name], probes[name])),
            ("data_aware_everywhere", (task[name], unit[name])),
            ("data_aware_no_task", (unit[name], probes[name])),
        ):
            ridge = {"data_aware_loose": 0.001, "data_aware_tight": 1.0}.get(method, RIDGE)
            by_hand = data_aware_by_hand(delta, *seen, strength, ridge)
            torch.testing.assert_close(apply(method, update, strength)[name], by_hand, rtol=1e-5, atol=1e-5)


def test_the_relative_change_is_that_of_the_dense_updates():
    update = make_update()
    raw = dense(update)
    for method in ("scaling", "guard", "data_aware"):
        factors = METHODS[method].apply(update, 3.0, 4, None)
        changed = sum((X - raw[name]).square().sum() for name, X in dense(update, factors).items())
        expected = (changed / sum(delta.square().sum() for delta in raw.values())).sqrt().item()
        assert relative_change(update, factors) == pytest.approx(expected)


def test_shuffled_probes_are_those_of_another_input_of_the_same_size():
    probes = make_update().activations.probes
    probes["c"] = probes["a"]  # two modules with one input
    for seed in range(5):
        other = shuffled_vectors(probes, generator(seed))
        for name, vectors in probes.items():
            assert other[name].shape == vectors.shape
            assert other[name] is not vectors
        assert other["a"] is other["c"]
        assert {id(kept) for kept in other.values()} == {id(kept) for kept in probes.values()}


@given(seed=st.integers(0, 50), rank=st.integers(1, 6), strength=st.floats(0.0, 100.0) | st.just(math.inf))
@settings(deadline=None, max_examples=25)
def test_guards_sides_and_projection_are_what_their_names_say(seed, rank, strength):
    update = make_update(seed)
    raw, gain = dense(update), 1.0 / (1.0 + strength)
    for name, delta in raw.items():
        on_output, on_input = projectors(update, name, rank)
        torch.testing.assert_close(
            apply("guard_input", update, strength, rank)[name], delta - (1 - gain) * delta @ on_input
        )
        torch.testing.assert_close(
            apply("guard_output", update, strength, rank)[name], delta - (1 - gain) * on_output @ delta
        )
        torch.testing.assert_close(apply("projection", update, rank=rank)[name], on_output @ delta @ on_input)


@pytest.mark.parametrize("preset", ["csulora", "guard"])
def test_norms_are_matched_exactly(preset):
    update = make_update()
    done = corrections(update, getattr(Penalty, preset)(3.0), update.at_rank(4))
    target, raw = apply(preset, update, 3.0), dense(update)

    whole = dense(update, scaled_to_norm(update, done))
    ratio = math.sqrt(sum(X.square().sum() for X in target.values()) / sum(D.square().sum() for D in raw.values()))
    each, noisy = dense(update, scaled_by_module(update, done)), dense(update, with_noise(update, done, generator()))
    for name in raw:
        torch.testing.assert_close(whole[name], ratio * raw[name])
        torch.testing.assert_close(each[name], raw[name] * target[name].norm() / raw[name].norm())
        torch.testing.assert_close((noisy[name] - raw[name]).norm(), (target[name] - raw[name]).norm())
        assert torch.linalg.matrix_rank(noisy[name]) == 3


def test_an_update_of_zero_stays_zero_in_every_method():
    update = make_update()
    nothing = {name: (A, torch.zeros_like(B)) for name, (A, B) in update.factors.items()}
    update = replace(update, factors=nothing)
    for method in APPLIED:
        assert all(not X.any() for X in apply(method, update).values()), method


@given(seed=st.integers(0, 20), rank=st.integers(1, 6))
@settings(deadline=None, max_examples=20)
def test_random_subspaces_are_orthonormal_of_equal_rank_and_not_the_true_ones(seed, rank):
    bases = make_update(seed).at_rank(rank)
    for name, sides in random_bases(bases, generator(seed)).items():
        for side, true in zip(sides, bases[name], strict=True):
            assert side.shape == true.shape
            torch.testing.assert_close(side.T @ side, torch.eye(rank, dtype=side.dtype))
            assert not torch.allclose(side @ side.T, true @ true.T)


@given(seed=st.integers(0, 50))
@settings(deadline=None, max_examples=25)
def test_shuffled_means_that_every_module_has_anothers_basis_of_its_shape_and_each_is_used_once(seed):
    bases = make_update().at_rank(4)
    shuffled = shuffled_bases(bases, generator(seed))
    owner = {id(pair): name for name, pair in bases.items()}
    moved = {name: owner[id(pair)] for name, pair in shuffled.items()}
    assert sorted(moved.values()) == sorted(bases)
    for name, source in moved.items():
        assert name != source
        assert SHAPES[name] == SHAPES[source]


def test_a_module_without_a_partner_cannot_be_shuffled():
    bases = make_update().at_rank(4)
    del bases["e"]
    with pytest.raises(
        ValueError, match=r"at least two modules of every shape.*'d' is the only one of shape \(9, 14\)"
    ):
        shuffled_bases(bases, generator())


def dense_safe_lora(update: Update) -> tuple[dict, dict]:
    """The formula with every matrix written out: C, C·B·A, and the cosine that selects the module."""
    mapped, cosine = {}, {}
    for name, (A, B) in update.factors.items():
        D = update.displacement(name)
        C = D @ D.T / torch.linalg.matrix_norm(D)
        mapped[name] = C @ B @ A
        cosine[name] = torch.nn.functional.cosine_similarity(
            mapped[name].reshape(1, -1), (B @ A).reshape(1, -1)
        ).item()
    return mapped, cosine


@given(seed=st.integers(0, 50), threshold=st.floats(-1.0, 1.0), number=st.integers(1, 7))
@settings(deadline=None, max_examples=25)
def test_safe_lora_is_the_published_formula(seed, threshold, number):
    update = make_update(seed)
    mapped, cosine = dense_safe_lora(update)
    smallest = sorted(cosine, key=cosine.get)[:number]
    for factors, chosen in (
        (safe_lora(update, threshold=threshold), {name for name in cosine if cosine[name] <= threshold}),
        (safe_lora(update, number=number), set(smallest)),
    ):
        for name, (A, B) in factors.items():
            raw = update.factors[name][1] @ update.factors[name][0]
            torch.testing.assert_close(B @ A, mapped[name] if name in chosen else raw)


def test_safe_loras_matrix_is_no_projector():
    update = make_update()
    once = safe_lora(update, number=len(SHAPES))
    twice = safe_lora(replace(update, factors=once), number=len(SHAPES))
    assert not torch.allclose(once["a"][1], twice["a"][1], rtol=0.1)
