"""Trainings that a user would run instead: each loss against its formula, dense and on the whole batch."""

import pytest
import torch

from recipes.evidence.controls import Control, along_displacement, mixed_in, near_aligned
from recipes.evidence.toy_frontier import ToySubject
from recipes.files.recipe import load_recipe
from tests.recipes.test_toy_frontier import TINY


@pytest.fixture(scope="module")
def lab():
    return ToySubject(load_recipe("recipes/frontier.yaml", TINY))


@pytest.fixture
def pair(lab):
    """With an adapter that does something."""
    pair = lab.pair(0)
    generator = torch.Generator().manual_seed(0)
    pair.adapter.write(
        {n: tuple(0.3 * torch.randn(f.shape, generator=generator) for f in both) for n, both in pair.fresh.items()}
    )
    return pair


@pytest.mark.parametrize(("share", "count"), [(0.125, 5), (0.5, 32)])
def test_refusals_are_a_share_of_the_batch_and_count_as_its_rows_do(lab, pair, share, count):
    batch, asked = lab._draw(0, 0.05)(torch.Generator().manual_seed(1)), []
    refusals = lab._refusals(0, 0.05)
    loss = mixed_in(pair.model, lambda n: asked.append(refusals(n)) or asked[-1], share, 32)
    mixed = loss(pair.model(**batch).loss, batch)
    (more,) = asked
    assert len(more["labels"]) == count
    whole = {key: torch.cat([batch[key], more[key]]) for key in batch}
    torch.testing.assert_close(mixed, pair.model(**whole).loss)


def test_the_divergence_is_from_the_aligned_model_on_the_refusals_tokens(lab, pair):
    batch = lab._draw(0, 0.05)(torch.Generator().manual_seed(1))
    asked, refusals = [], lab._refusals(0, 0.05)
    loss = near_aligned(pair.model, pair.adapter.off, lambda n: asked.append(refusals(n)) or asked[-1], 2.0)
    own = torch.tensor(1.5)
    found = loss(own, batch)
    (more,) = asked
    with torch.no_grad(), pair.model.disable_adapter():
        aligned = pair.model(**more).logits.double().softmax(-1)
    trained = pair.model(**more).logits.double().softmax(-1)
    by_hand = []
    for row, labels in enumerate(more["labels"].tolist()):
        for place, label in enumerate(labels[1:]):
            if label != -100:
                p, q = aligned[row, place], trained[row, place]
                by_hand.append((p * (p.log() - q.log())).sum())
    torch.testing.assert_close(found.double(), 1.5 + 2.0 * torch.stack(by_hand).mean(), rtol=1e-4, atol=1e-5)
    pair.adapter.write(pair.fresh)
    assert loss(own, batch).item() == pytest.approx(1.5, abs=1e-6)


def test_the_penalty_across_the_displacement_is_the_dense_one(pair):
    loss = along_displacement(pair._live, pair.displacement, 3.0)
    expected = 0.0
    for name, (A, B, s) in pair._live().items():
        D, update = pair.displacement(name).double(), s * (B.double() @ A.double())
        across = torch.eye(len(D), dtype=torch.float64) - D @ D.T / D.norm()
        expected += (across @ update).square().sum()
    found = loss(torch.tensor(1.0), {})
    torch.testing.assert_close(found.double(), 1.0 + 3.0 * expected, rtol=1e-4, atol=1e-5)
    gradients = torch.autograd.grad(found, pair.adapter.parameters)  # kept nowhere: the lab trains again
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


@pytest.mark.parametrize("kind", ["mixing", "kl", "asft", "one_shot"])
def test_a_control_is_the_plain_training_with_one_thing_changed(lab, kind):
    plain, same = (lab.train(0, 0.05, Control(), [])["raw"] for _ in range(2))
    amounts = {"mixing": 0.25, "kl": 1.0, "asft": 1.0, "one_shot": 2}
    changed = lab.train(0, 0.05, Control(kind, amounts[kind]), [])["raw"]
    nothing = lab.train(0, 0.05, Control(kind, 0.0), [])["raw"] if kind in ("kl", "asft") else plain
    for name, both in plain.items():
        assert all(map(torch.equal, both, same[name]))
        assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(both, nothing[name], strict=True))
    assert any(not torch.equal(both[1], changed[name][1]) for name, both in plain.items())
