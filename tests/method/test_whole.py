"""A weight that was trained whole is corrected as by projections as wide as it is, in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from csulora_callback import Penalty, correct
from csulora_callback.method.gauge import CorrectionOverflowError
from csulora_callback.method.penalty import BLOCKS
from csulora_callback.method.token_space import input_gain
from csulora_callback.method.whole import correct_whole

PENALTIES = [
    Penalty.csulora(5.0),
    Penalty.separable(5.0),
    Penalty.guard(3.0),
    Penalty.projection(),
    Penalty.table(aligned=0.5, output=1.0, input=3.0, off=math.inf),
]


def side(rows: int, k: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(rows, k, generator=torch.Generator().manual_seed(seed)).double()).Q.float()


def dense(update, R, C, penalty, transposed):
    """By projections on rows and columns; of a transposed weight the columns are the output side."""
    P, Q = (own.double() @ own.double().T for own in (R, C))
    P_, Q_ = torch.eye(len(P)).double() - P, torch.eye(len(Q)).double() - Q
    blocks = [P @ update @ Q, P @ update @ Q_, P_ @ update @ Q, P_ @ update @ Q_]
    if transposed:
        blocks[1], blocks[2] = blocks[2], blocks[1]
    energy = dict(zip(BLOCKS, (part.square().sum().item() for part in blocks), strict=True))
    gain = penalty.gain({block: part / sum(energy.values()) for block, part in energy.items()})
    return sum(gain[block] * part for block, part in zip(BLOCKS, blocks, strict=True)), energy


@settings(deadline=None, max_examples=25)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    k=st.integers(0, 5),
    new=st.integers(0, 3),
    transposed=st.booleans(),
    penalty=st.sampled_from(PENALTIES),
    seed=st.integers(0, 9),
)
def test_it_is_the_closed_form(rows, columns, k, new, transposed, penalty, seed):
    generator = torch.Generator().manual_seed(seed)
    aligned = torch.randn(rows + new, columns, generator=generator)
    weight = aligned + 0.1 * torch.randn(rows + new, columns, generator=generator)
    R, C = side(rows, min(k, rows), seed), side(columns, min(k, columns), seed + 1)
    sides = (C, R) if transposed else (R, C)
    done = correct_whole(weight, aligned, *sides, penalty, transposed)

    update = (weight.double() - aligned.double())[:rows]
    closest, energy = dense(update, R, C, penalty, transposed)
    expected = torch.cat([aligned[:rows].double() + closest, weight[rows:].double()])
    torch.testing.assert_close(done.weight.double(), expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(done.weight[rows:], weight[rows:])
    for block in BLOCKS:
        assert done.energy[block] == pytest.approx(energy[block], rel=1e-5, abs=1e-5 * sum(energy.values()))
    assert done.closest_norm == pytest.approx(closest.norm().item(), rel=1e-5, abs=1e-5)
    change = (closest - update).norm() / update.norm()
    # A root: of float32 bases that hold nearly all of the update what is left is rounding.
    assert done.relative_change**2 == pytest.approx(change.item() ** 2, rel=1e-5, abs=1e-6)
    pairs = min(R.shape[1], C.shape[1])
    for found, matrix in ((done.along, update), (done.corrected_along, closest)):
        by_hand = torch.stack([R[:, i].double() @ matrix @ C[:, i].double() for i in range(pairs)] or [torch.zeros(0)])
        torch.testing.assert_close(found, by_hand.double().flatten(), atol=1e-5, rtol=1e-5)
    measured = correct_whole(weight, aligned, *sides, penalty, transposed, measure_only=True)
    assert measured.weight is None
    assert (measured.energy, measured.relative_change) == (done.energy, done.relative_change)


@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
def test_it_is_what_lora_of_full_rank_gives(penalty):
    """Which keeps all of the closest safe update, so that the two must agree."""
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(12, 12, generator=generator), torch.randn(20, 12, generator=generator)
    U, V, aligned = side(20, 3, 1), side(12, 3, 2), torch.zeros(20, 12, dtype=torch.float64)
    lora = correct(A.double(), B.double(), U, V, penalty)
    done = correct_whole(B.double() @ A.double(), aligned, U, V, penalty)
    torch.testing.assert_close(done.weight, lora.lora_B @ lora.lora_A, atol=1e-5, rtol=1e-5)
    assert done.relative_energy == pytest.approx(lora.relative_energy, abs=1e-6)


def test_pieces_of_rows_make_the_same(monkeypatch):
    weight, aligned, U, V = torch.rand(50, 6), torch.rand(50, 6), side(50, 3, 1), side(6, 3, 2)
    at_once = correct_whole(weight, aligned, U, V, Penalty.csulora(5.0))
    monkeypatch.setattr("csulora_callback.method.whole._ENTRIES", 40)  # six rows at a time, and two are left
    in_pieces = correct_whole(weight, aligned, U, V, Penalty.csulora(5.0))
    torch.testing.assert_close(in_pieces.weight, at_once.weight, atol=1e-7, rtol=0)
    assert in_pieces.energy == pytest.approx(at_once.energy, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_strength_of_zero_and_an_update_of_zero_change_no_bit(dtype):
    weight, U, V = torch.rand(9, 6).to(dtype), side(9, 2, 1), side(6, 2, 2)
    done = correct_whole(weight, torch.rand(9, 6), U, V, Penalty.guard(0.0))
    assert torch.equal(done.weight, weight)
    assert done.weight.data_ptr() != weight.data_ptr()
    same = correct_whole(weight, weight, U, V, Penalty.projection())
    assert torch.equal(same.weight, weight)
    assert (same.update_norm, same.relative_change, same.corrected_norm) == (0.0, 0.0, 0.0)


def test_what_was_aligned_counts_as_training_began_with_it():
    """A checkpoint in float32 that is trained in bfloat16: what that rounded away is no update."""
    aligned = torch.rand(9, 6, generator=torch.Generator().manual_seed(1))
    weight = aligned.bfloat16()
    assert correct_whole(weight, aligned, side(9, 2, 1), side(6, 2, 2), Penalty.projection()).update_norm == 0.0


def test_rows_that_were_cut_off_count_as_unchanged():
    """A vocabulary may have been cut after the subspace was estimated: its side has more rows than the weight."""
    U, V, aligned, weight = side(12, 3, 1), side(6, 2, 2), torch.rand(12, 6), torch.rand(12, 6)
    weight[9:] = aligned[9:]
    whole = correct_whole(weight, aligned, U, V, Penalty.guard(3.0))
    cut = correct_whole(weight[:9], aligned, U, V, Penalty.guard(3.0))
    torch.testing.assert_close(cut.weight, whole.weight[:9], atol=1e-6, rtol=0)


def test_activations_move_each_row():
    task, probes = torch.randn(20, 6), torch.randn(4, 6)
    weight, aligned, gain = torch.rand(30, 6), torch.rand(30, 6), input_gain(task, probes, 4.0)
    U, V = side(30, 3, 1), side(6, 2, 2)
    done = correct_whole(weight, aligned, U, V, Penalty.data_aware(4.0), input_gain=gain)
    update = (weight - aligned).double()
    moved = gain(update)
    torch.testing.assert_close(done.weight.double(), aligned.double() + moved, atol=1e-6, rtol=0)
    assert done.relative_change == pytest.approx(((moved - update).norm() / update.norm()).item(), rel=1e-6)
    assert done.closest_norm == pytest.approx(moved.norm().item(), rel=1e-6)
    torch.testing.assert_close(done.corrected_along, torch.diagonal(U.double().T @ moved @ V.double()))


def test_what_its_dtype_cannot_hold_names_the_module():
    U, V = side(2, 1, 1), side(2, 1, 2)
    large, aligned = torch.full((2, 2), 6e4, dtype=torch.float16), torch.full((2, 2), -6e4, dtype=torch.float16)
    gain = input_gain(torch.eye(2)[:1], torch.ones(1, 2), 1e3)
    with pytest.raises(
        CorrectionOverflowError, match="module 'lm_head': `weight`: expected one whose correction float16"
    ):
        correct_whole(large, aligned, U, V, Penalty.data_aware(1e3), input_gain=gain, name="lm_head")
