"""Systems of many modules at once and gains of many strengths, against one dense float64 computation for each."""

import re

import pytest
import torch

from csulora_callback.method import token_space
from csulora_callback.method.token_space import MAX_STRENGTH, gains_of, input_gain, input_gains, token_systems

SHAPES = {"a": (7, 5, 12), "b": (7, 5, 12), "c": (7, 5, 12), "d": (9, 5, 12), "e": (20, 30, 16), "f": (0, 4, 12)}
"""Of task, probes, and width, by module; of ``f`` nothing is known of the task."""


def tokens(dtype=torch.bfloat16) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    generator, task, probes = torch.Generator().manual_seed(0), {}, {}
    for name, (n_task, n_probes, width) in SHAPES.items():
        scales = torch.logspace(0, -2, width)  # as activations have: some directions carry most
        probes[name] = (torch.randn(n_probes, width, generator=generator) * scales).to(dtype)
        if n_task:
            task[name] = (3.0 * torch.randn(n_task, width, generator=generator) * scales).to(dtype)
    task["unread"] = torch.ones(2, 12).to(dtype)
    return task, probes


def dense(A, task, probes, strength, ridge) -> torch.Tensor:
    """``A C_T (C_T + λ C_H)⁻¹``, with matrices as wide as the module."""
    width, identity = probes.shape[1], torch.eye(probes.shape[1], dtype=torch.float64)
    moments = [x.double().T @ x.double() * (width / x.double().square().sum()) for x in (task, probes) if len(x)]
    C_T = (moments[0] + ridge * identity) / (1.0 + ridge) if len(task) else identity
    return torch.linalg.solve((C_T + strength * moments[-1]).T, (A.double() @ C_T).T).T


@pytest.mark.parametrize("chunk", [1, 4000, 2**27])
def test_many_modules_and_strengths_are_each_the_dense_solution(chunk, monkeypatch):
    monkeypatch.setattr(token_space, "_CHUNK", chunk)
    task, probes = tokens()
    systems, generator = token_systems(task, probes, ridge=0.05), torch.Generator().manual_seed(1)
    assert list(systems) == list(probes)
    for strength in (0.0, 0.3, 10.0, 1000.0, MAX_STRENGTH):
        gains = gains_of(systems, strength)
        for name, own in probes.items():
            A = torch.randn(3, own.shape[1], generator=generator)
            known = task.get(name, own[:0])
            expected, got = dense(A, known, own, strength, 0.05), gains[name](A)
            assert got.dtype == A.dtype
            assert (got - expected).norm() <= 1e-6 * A.norm(), (name, strength)
            assert torch.equal(got, input_gain(known, own, strength, 0.05)(A))


def test_the_chunks_are_of_bounded_size(monkeypatch):
    together, solve = [], token_space._solve

    def watched(tasks, probes, *others):
        together.append([tuple(T.shape) for T in tasks])
        return solve(tasks, probes, *others)

    monkeypatch.setattr(token_space, "_solve", watched)
    monkeypatch.setattr(token_space, "_CHUNK", 2 * 8 * (7 * 12 + 5 * 12 + 3 * 7**2 + 3 * 5**2))
    token_systems(*tokens())  # two of the first three fit together, and one that is larger is solved alone
    assert together == [[(7, 12)] * 2, [(7, 12)], [(9, 12)], [(20, 16)], [(0, 12)]]


def test_modules_of_one_input_share_it_and_no_token_is_copied():
    vectors, other = torch.randn(6, 8).bfloat16(), torch.randn(6, 8).bfloat16()
    probes = {"q": vectors, "k": vectors, "o": other}
    systems = token_systems({"q": other, "k": other, "o": other}, probes)
    gains = gains_of(systems, 3.0)
    assert systems["q"] is systems["k"]
    assert gains["q"] is gains["k"]
    assert gains["q"] is not gains["o"]
    assert gains["q"].probes.data_ptr() == vectors.data_ptr()
    assert gains["q"].system.task.vectors.data_ptr() == other.data_ptr()
    stacks = {x.untyped_storage().nbytes() for x in (systems["q"].inner, systems["o"].explained, gains["o"].cholesky)}
    assert stacks == {8 * 6 * 6}  # each alone, and none a part of a larger one


def test_rows_of_several_modules_may_be_stacked():
    task, probes = tokens()
    gain, A = gains_of(token_systems(task, probes), 10.0)["a"], torch.randn(6, 12)
    torch.testing.assert_close(gain(A), torch.cat([gain(A[:2]), gain(A[2:])]), rtol=1e-6, atol=1e-7)


def test_what_is_given_is_left_as_it_is():
    task, probes = tokens(torch.float64)
    before = [tensor.clone() for kind in (task, probes) for tensor in kind.values()]
    gain, A = input_gains(task, probes, 10.0)["a"], torch.ones(2, 12, dtype=torch.float64)
    gain(A)
    assert all(torch.equal(*pair) for pair in zip((*task.values(), *probes.values()), before, strict=True))
    assert torch.equal(A, torch.ones(2, 12))


@pytest.mark.parametrize(
    ("task", "probes", "message"),
    [
        (torch.ones(2, 3), torch.ones(2, 4), "`probes`: expected vectors of module 'k' of d_in = 3"),
        (torch.ones(2, 4), torch.full((2, 4), torch.inf), "`probes`: expected finite values of module 'k'"),
        (torch.ones(2), torch.ones(2, 4), "`task`: expected token vectors of module 'k'"),
    ],
)
def test_of_several_modules_the_bad_one_is_named(task, probes, message):
    fine = torch.ones(2, 4)
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        token_systems({"q": fine, "k": task}, {"q": fine, "k": probes})
