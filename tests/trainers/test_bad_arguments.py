"""Arguments that contradict each other, and subspaces that are none, are refused before the first step."""

import copy
import dataclasses
import re

import pytest
from transformers import AutoModelForCausalLM

from csulora_callback import CSULoRACallback, Penalty, SafetyCorrector, SafetySubspace, subspace_file
from tests.helpers.lab import RANK, make_trainer, with_lora


@pytest.mark.parametrize("penalty", [Penalty.guard(3.0), Penalty.projection(), Penalty.data_aware(1.0)])
@pytest.mark.parametrize("strength", [10.0, 3.0, 0])
def test_strength_beside_a_penalty(penalty, strength):
    probes = {} if penalty.on_probes is None else {"probes": [[1, 2]]}
    message = f"`strength`: expected None beside `penalty`, which has its own, but got {strength} and {penalty}. "
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        CSULoRACallback(base_model="org/base", penalty=penalty, strength=strength, **probes)
    assert CSULoRACallback(base_model="org/base", penalty=penalty, **probes).penalty == penalty


def test_strength_alone_is_that_of_the_papers_penalty():
    assert CSULoRACallback(base_model="org/base").penalty == Penalty.csulora(10.0)
    assert CSULoRACallback(base_model="org/base", strength=3.0).penalty == Penalty.csulora(3.0)
    assert CSULoRACallback(base_model="org/base", strength=0).penalty == Penalty.csulora(0.0)


def longer(subspace: SafetySubspace) -> dict:
    """Its bases, with one whose columns are 1000 times as long as they should be."""
    name = list(subspace)[3]
    return {**subspace.bases, name: dataclasses.replace(subspace[name], U=1000 * subspace[name].U)}


def test_a_subspace_file_whose_bases_are_not_orthonormal(pair, subspace, tmp_path):
    path, name = tmp_path / "subspace.safetensors", list(subspace)[3]
    subspace_file.write(longer(subspace), subspace.metadata, path)
    model = with_lora(AutoModelForCausalLM.from_pretrained(pair[1]))
    before = copy.deepcopy(model.state_dict())
    trainer = make_trainer(model, tmp_path / "output", [CSULoRACallback(subspace=path)])
    message = f"^`subspace`: module '{re.escape(name)}': expected orthonormal columns in U"
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0
    assert all((before[key].cpu() == value.cpu()).all() for key, value in model.state_dict().items())
    assert not [file for file in (tmp_path / "output").rglob("*") if file.is_file()]


def test_a_subspace_object_whose_bases_are_not_orthonormal(pair, subspace):
    with pytest.raises(ValueError, match=r"^`subspace`: module 'model\..*': expected orthonormal columns in U"):
        CSULoRACallback(subspace=SafetySubspace(longer(subspace), subspace.metadata))
    model = with_lora(AutoModelForCausalLM.from_pretrained(pair[1]))
    with pytest.raises(ValueError, match=r"^`subspace`: module 'model\..*': expected orthonormal columns in U"):
        SafetyCorrector(model, SafetySubspace(longer(subspace), {}), Penalty.guard(1.0))
    whole = SafetyCorrector(model, SafetySubspace(subspace.bases, {}), Penalty.guard(1.0))
    assert whole.subspace[list(subspace)[3]].U.shape[1] == RANK


@pytest.mark.parametrize(
    ("steps", "probes", "message"),
    [
        (5, None, r"`probe_every_n_steps`: expected None without `probes`, but got 5\. Pass probes='builtin' too"),
        (0, "builtin", r"`probe_every_n_steps`: expected a number of steps ≥ 1 or None, but got 0"),
    ],
)
def test_measuring_every_few_steps_takes_probes_and_a_number(steps, probes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        CSULoRACallback(base_model="org/base", probes=probes, probe_every_n_steps=steps)
    assert len(CSULoRACallback(base_model="org/base", probes="builtin", probe_every_n_steps=5).probes) == 160
