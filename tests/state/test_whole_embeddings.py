"""Whole embeddings of adapters that were saved: which rows count, and of which checkpoint."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from csulora_callback import Penalty, SafetySubspace, correct_adapter
from csulora_callback.models.adapters import find_adapter
from tests.helpers import hub_cache
from tests.helpers.beside import dense, key, saved, tables
from tests.helpers.lab import RANK, TARGETS, VOCABULARY, with_lora

SIDED = Penalty.table(aligned=0.25, output=4.0, input=0.5, off=1.0)  # tells an output side from an input side


def test_the_subspace_is_held_against_the_revision_that_was_trained(pair, tmp_path, monkeypatch):
    hub_cache.keep(pair, tmp_path, monkeypatch)
    model = with_lora(AutoModelForCausalLM.from_pretrained(pair[1]), modules_to_save=["lm_head"])
    model.peft_config["default"].base_model_name_or_path = hub_cache.NAME
    model.peft_config["default"].revision = "v2"
    model.save_pretrained(tmp_path / "raw")
    subspace = SafetySubspace.estimate(*pair, target_modules=[*TARGETS, "lm_head"], rank=RANK, progress=False)
    assert "lm_head" in correct_adapter(tmp_path / "raw", subspace, tmp_path / "safe", SIDED).record["modules"]


@pytest.mark.parametrize("name", ["model.embed_tokens", "lm_head"])
def test_of_a_vocabulary_that_was_cut_the_displacement_counts_that_is_left(pair, tmp_path, name):
    """As by `resize_token_embeddings(len(tokenizer))`, where the checkpoints' vocabulary is padded."""
    rows = VOCABULARY - 7
    model = AutoModelForCausalLM.from_pretrained(pair[1])
    model.resize_token_embeddings(rows)
    model = with_lora(model, init_lora_weights=False, modules_to_save=[name.removeprefix("model.")])
    before, whole = tables(pair[1])[name][:rows], find_adapter(model).layers[name]
    torch.manual_seed(4)
    with torch.no_grad():
        model.get_parameter(f"base_model.model.{name}.modules_to_save.default.weight").add_(torch.randn(rows, 16))
    model.save_pretrained(tmp_path / "raw")
    subspace = SafetySubspace.estimate(*pair, target_modules=[*TARGETS, name], rank=RANK, progress=False)
    correct_adapter(tmp_path / "raw", subspace, tmp_path / "safe", SIDED)

    basis, update = subspace[name], saved(tmp_path / "raw")[key(name)] - before
    D = basis.U.double() * basis.singular_values.double() @ basis.V.double().T
    expected, _ = dense(update, D[:rows], SIDED, transposed=whole.stored_transposed)
    written = saved(tmp_path / "safe")[key(name)].double() - before.double()
    torch.testing.assert_close(written, expected, atol=1e-5, rtol=0)
