"""A corrector beside others: weights that are read while they come and go, and activations that are replaced."""

import threading

import pytest
import torch
from peft import PeftModel

from csulora_callback import Penalty, SafetyCorrector
from csulora_callback.method import token_space
from csulora_callback.models.activations import Activations, Texts
from csulora_callback.models.adapters import find_adapter
from csulora_callback.models.factors import equal
from tests.helpers.huggingface import fresh_model
from tests.helpers.lab import PENALTY


@pytest.fixture
def model(pair) -> PeftModel:
    return fresh_model(pair, init_lora_weights=False)


def test_newer_activations_count_from_the_next_window_on(model, subspace):
    older, newer = (Activations.read(find_adapter(model), Texts([[5, 6]], [probe], 1)) for probe in ([7, 8], [9, 10]))
    corrector = SafetyCorrector(model, subspace, Penalty.data_aware(4.0), older)
    with corrector.corrected() as first:
        pass
    corrector.activations = newer
    expected = SafetyCorrector(model, subspace, Penalty.data_aware(4.0), newer).compute().corrected
    with corrector.corrected() as second:
        assert equal(corrector.adapter.read(), expected)
    assert equal(second.corrected, expected)
    assert not equal(first.corrected, expected)


def test_systems_are_solved_once_for_all_strengths_and_anew_for_newer_activations(model, subspace, monkeypatch):
    solved, solve = [], token_space._solve
    monkeypatch.setattr(token_space, "_solve", lambda *args: solved.append(1) or solve(*args))
    read = [Activations.read(find_adapter(model), Texts([[5, 6]], [probe], 1)) for probe in ([7, 8], [9, 10])]
    corrector, fresh = SafetyCorrector(model, subspace, Penalty.data_aware(1.0), read[0]), []
    for activations in read:
        corrector.activations = activations
        before, counts = len(solved), []
        for strength in (1.0, 30.0, 4.0):
            corrector.penalize(Penalty.data_aware(strength))
            fresh.append((activations, strength, corrector.compute().corrected))
            counts.append(len(solved) - before)
        assert counts[0] > 0
        assert len(set(counts)) == 1
    for activations, strength, corrected in fresh:
        alone = SafetyCorrector(model, subspace, Penalty.data_aware(strength), activations)
        assert equal(alone.compute().corrected, corrected)


def test_no_corrected_factors_come_in_while_a_state_dict_is_taken(model, subspace):
    corrector, entered = SafetyCorrector(model, subspace, PENALTY), threading.Event()

    def evaluate() -> None:
        with corrector.corrected():
            entered.set()

    thread = threading.Thread(target=evaluate)

    def state_dict() -> dict[str, torch.Tensor]:
        thread.start()
        assert not entered.wait(timeout=0.5)
        return model.state_dict()

    raw = corrector.adapter.read()
    _, factors = corrector.taken(state_dict, model)
    thread.join()
    assert entered.is_set()
    assert equal(factors, raw)
