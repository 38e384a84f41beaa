"""What cannot be corrected is refused with a clear error, before the first step, and nothing is written.

Every error names the argument or module, what was expected and what came. Only a NaN that appears during training does
not stop the run: the raw adapter is saved then, and says so.
"""

import copy
import json
import logging
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, TrainerCallback

from csulora_callback import CSULoRACallback, SafetySubspace
from csulora_callback.models.adapters import find_adapter
from csulora_callback.models.factors import to_peft_state_dict
from tests.helpers.lab import RANK, TARGETS, align, make_trainer, tiny_llama, with_lora


def aligned_model(pair):
    return AutoModelForCausalLM.from_pretrained(pair[1])


def refused(callbacks: list, output: Path, model, error: type[Exception] = ValueError, resume=None, step=0) -> str:
    """The text of the error that training raises, after making sure that nothing has happened until then."""
    trainer = make_trainer(model, output, callbacks)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error) as raised:
        trainer.train(resume_from_checkpoint=resume)
    assert not [path for path in output.rglob("*") if path.is_file()]
    assert trainer.state.global_step == step
    if resume is None:
        torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0, equal_nan=True)
    return str(raised.value)


def assert_says(text: str, *parts: str) -> None:
    for part in parts:
        assert part in text, f"{part!r} is not in: {text}"


# Arguments of the constructor.


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"base_model": None}, ["`base_model`", "expected the unaligned base checkpoint", "got neither"]),
        ({"subspace": "file.safetensors"}, ["`base_model`", "expected the unaligned base checkpoint", "got both"]),
        ({"penalty": "csulora"}, ["`penalty`", "expected a Penalty", "got 'csulora'"]),
        ({"strength": -1.0}, ["`strength`", "expected a number ≥ 0", "got -1.0"]),
        ({"strength": math.nan}, ["`strength`", "expected a number ≥ 0", "got nan"]),
        ({"strength": "10"}, ["`strength`", "expected a number ≥ 0", "got '10'"]),
        ({"every_n_steps": 0}, ["`every_n_steps`", "expected a number of steps ≥ 1 or None", "got 0"]),
        ({"every_n_steps": 2.5}, ["`every_n_steps`", "expected a number of steps ≥ 1 or None", "got 2.5"]),
        ({"log_every_n_steps": -1}, ["`log_every_n_steps`", "expected a number of steps ≥ 1 or None", "got -1"]),
        ({"rank": 0}, ["`rank`", "expected a whole number ≥ 1", "got 0"]),
        ({"rank": 2.0}, ["`rank`", "expected a whole number ≥ 1", "got 2.0"]),
        ({"energy": 1.5}, ["`energy`", "expected a share in (0, 1]", "got 1.5"]),
        ({"energy": 0.5, "rank": 4}, ["`energy`", "expected None beside `rank`", "got 0.5 and 4", "Pass one"]),
        ({"energy": 0.0}, ["`energy`", "expected a share in (0, 1]", "got 0.0"]),
    ],
    ids=str,
)
def test_arguments_out_of_range(arguments, parts):
    with pytest.raises(ValueError, match=re.escape(parts[0])) as raised:
        CSULoRACallback(**{"base_model": "org/base", **arguments})
    assert_says(str(raised.value), *parts)


# Checkpoints.


def nothing_moved(base):
    return base


def other_shapes(base):
    return tiny_llama(intermediate_size=32)


def fewer_layers(base):
    return tiny_llama(num_hidden_layers=1)


def other_architecture(base):
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1))


def with_value(value: float):
    def change(base):
        base = align(base, seed=9)
        with torch.no_grad():
            base.model.layers[1].self_attn.v_proj.weight[3, 5] = value
        return base

    return change


DOWN, V = "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.v_proj"
BASES = {
    "equal to aligned": (nothing_moved, ["`base`: base equal to aligned", "none of the 6 target modules differs"]),
    "other shapes": (other_shapes, [f"'{DOWN}.weight' is (16, 32) in", "and (16, 24) in", "different architectures"]),
    "fewer layers": (fewer_layers, ["'model.layers.1.mlp.down_proj'", f"nearest names: ['{DOWN}'"]),
    "other architecture": (
        other_architecture,
        [f"has none of them, such as '{DOWN}'; nearest names: ['tr", "Is it of the architecture of the other one?"],
    ),
    "NaN": (with_value(math.nan), [f"the weight of '{V}' holds NaN or Inf", "expected finite values"]),
    "Inf": (with_value(math.inf), [f"the weight of '{V}' holds NaN or Inf", "expected finite values"]),
}


@pytest.mark.parametrize("case", BASES)
@pytest.mark.parametrize("where", ["folder", "memory"])
def test_base_checkpoints_that_do_not_fit(pair, tmp_path, case, where):
    change, parts = BASES[case]
    base = change(aligned_model(pair))
    if where == "folder":
        base.save_pretrained(tmp_path / "bad base")
        base, parts = tmp_path / "bad base", [*parts, str(tmp_path / "bad base")]
    callback = CSULoRACallback(base_model=base, rank=RANK, cache_dir=tmp_path / "cache")
    text = refused([callback], tmp_path / "output", with_lora(aligned_model(pair)))
    assert_says(text, *parts)
    assert not (tmp_path / "cache").exists()


def test_a_base_that_is_not_there(pair, tmp_path):
    callback = CSULoRACallback(base_model=tmp_path / "missing", cache_dir=tmp_path / "cache")
    text = refused([callback], tmp_path / "output", with_lora(aligned_model(pair)), error=FileNotFoundError)
    assert_says(text, str(tmp_path / "missing"), "expected a folder with a checkpoint or a Hub id")


def test_an_adapter_for_a_base(pair, tmp_path):
    with_lora(aligned_model(pair)).save_pretrained(tmp_path / "adapter")
    callback = CSULoRACallback(base_model=tmp_path / "adapter", cache_dir=tmp_path / "cache")
    text = refused([callback], tmp_path / "output", with_lora(aligned_model(pair)), error=FileNotFoundError)
    assert_says(text, str(tmp_path / "adapter"), "expected a whole checkpoint", "a PEFT adapter alone, which has no")


@pytest.mark.parametrize("where", ["below the adapter", "aligned_model"])
def test_aligned_weights_that_are_not_finite(pair, tmp_path, where):
    bad = with_value(math.nan)(aligned_model(pair))
    bad.save_pretrained(tmp_path / "bad aligned")
    live, given = (bad, None) if where == "below the adapter" else (aligned_model(pair), tmp_path / "bad aligned")
    callback = CSULoRACallback(base_model=pair[0], aligned_model=given, rank=RANK, cache_dir=tmp_path / "cache")
    text = refused([callback], tmp_path / "output", with_lora(live))
    assert_says(text, f"the weight of '{V}' holds NaN or Inf", "in memory" if given is None else str(given))


# Adapters.


@pytest.mark.parametrize(
    ("lora", "parts"),
    [
        (None, ["`model`: expected a model with LoRA layers, but found none", "get_peft_model"]),
        ({"use_dora": True}, ["layers.0", "DoRA (use_dora=True) is not supported", "not skipped in silence"]),
        ({"modules_to_save": ["model.norm"]}, ["module 'model.norm'", "modules_to_save", "is not supported"]),
    ],
    ids=["no LoRA layer", "DoRA", "modules_to_save"],
)
def test_adapters_that_cannot_be_corrected(pair, tmp_path, lora, parts):
    model = aligned_model(pair) if lora is None else with_lora(aligned_model(pair), **lora)
    callback = CSULoRACallback(base_model=pair[0], rank=RANK, cache_dir=tmp_path / "cache")
    assert_says(refused([callback], tmp_path / "output", model), *parts)


def test_two_callbacks_in_one_trainer(pair, subspace, tmp_path):
    callbacks = [CSULoRACallback(subspace=subspace), CSULoRACallback(subspace=subspace)]
    text = refused(callbacks, tmp_path / "output", with_lora(aligned_model(pair)))
    assert_says(text, "`callbacks`: expected one CSULoRACallback, but got several")


# Subspaces.


def flipped(good: bytes) -> bytes:
    return good[:-5] + bytes([good[-5] ^ 1]) + good[-4:]


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (lambda good: good[: len(good) // 2], ["is corrupt", "Estimate it again"]),
        (lambda good: b"", ["is corrupt", "Estimate it again"]),
        (lambda good: b"not a safetensors file", ["is corrupt", "Estimate it again"]),
        (flipped, ["is corrupt", "has the fingerprint", "was expected", "Estimate it again"]),
    ],
    ids=["cut short", "empty", "text", "one bit"],
)
def test_corrupt_subspace_files(pair, subspace, tmp_path, damage, parts):
    file = tmp_path / "subspace.safetensors"
    subspace.save(file)
    file.write_bytes(damage(file.read_bytes()))
    text = refused([CSULoRACallback(subspace=file)], tmp_path / "output", with_lora(aligned_model(pair)))
    assert_says(text, "`subspace`", str(file), *parts)


def test_foreign_and_missing_subspace_files(pair, tmp_path):
    foreign, missing = pair[1] / "model.safetensors", tmp_path / "missing.safetensors"
    text = refused([CSULoRACallback(subspace=foreign)], tmp_path / "output", with_lora(aligned_model(pair)))
    assert_says(text, "`subspace`: expected a safety subspace", str(foreign), "another safetensors file")
    model = with_lora(aligned_model(pair))
    text = refused([CSULoRACallback(subspace=missing)], tmp_path / "output", model, error=FileNotFoundError)
    assert_says(text, "`subspace`: expected a file that SafetySubspace.save wrote", f"{missing} is not there")


def test_subspaces_of_another_model(pair, tmp_path):
    def estimated(base, targets):
        return SafetySubspace.estimate(base, align(base), target_modules=targets, rank=RANK, progress=False)

    other = CSULoRACallback(subspace=estimated(tiny_llama(intermediate_size=32), TARGETS))
    text = refused([other], tmp_path / "output", with_lora(aligned_model(pair)))
    assert_says(text, "`subspace`", f"'{DOWN}' is 16 × 24 (d_out × d_in) in the model, but 16 × 32 in the subspace")

    fewer = CSULoRACallback(subspace=estimated(tiny_llama(), ["q_proj", "k_proj", "down_proj"]))
    text = refused([fewer], tmp_path / "output", with_lora(aligned_model(pair)))
    missing = "model.layers.0.self_attn.v_proj"
    assert_says(text, f"`subspace`: expected a basis for the adapted module '{missing}'", "nearest: ['model.layers.0.")


# Resuming.


@pytest.mark.slow
def test_a_resume_that_cannot_find_the_raw_factors(pair, subspace, tmp_path):
    def trained(output, resume=None, **arguments):
        callback = CSULoRACallback(subspace=subspace, **arguments)
        trainer = make_trainer(with_lora(aligned_model(pair)), output, [callback])
        trainer.train(resume_from_checkpoint=resume)
        return to_peft_state_dict(find_adapter(trainer.model).read())

    straight = trained(tmp_path / "straight")
    moved = tmp_path / "moved" / "elsewhere"
    shutil.copytree(tmp_path / "straight" / "checkpoint-4", moved)

    model = with_lora(aligned_model(pair))
    text = refused([CSULoRACallback(subspace=subspace)], tmp_path / "output", model, resume=str(moved), step=4)
    assert_says(
        text, "`resume_from`", "at step 4", "expected the raw factors of the corrected checkpoint", "resume_from=..."
    )
    wrong = CSULoRACallback(subspace=subspace, resume_from=tmp_path / "straight" / "checkpoint-8")
    text = refused([wrong], tmp_path / "output", with_lora(aligned_model(pair)), resume=str(moved), step=4)
    assert_says(text, "`resume_from`", "checkpoint-8")

    resumed = trained(tmp_path / "output", resume=str(moved), resume_from=moved)
    for key in straight:
        assert torch.equal(resumed[key], straight[key]), key


# During training.


class Poison(TrainerCallback):
    """Sets one entry of one ``lora_B`` to NaN at step 3."""

    def on_step_end(self, args, state, control, model, **kwargs) -> None:
        if state.global_step == 3:
            with torch.no_grad():
                next(p for name, p in model.named_parameters() if "lora_B" in name)[1, 1] = math.nan


def test_factors_that_become_nan_are_saved_raw_and_do_not_stop_the_run(pair, tmp_path, caplog):
    for name in ("without", "with"):
        callback = CSULoRACallback(base_model=pair[0], rank=RANK, cache_dir=tmp_path / "cache")
        callbacks = [Poison(), callback] if name == "with" else [Poison()]
        trainer = make_trainer(with_lora(aligned_model(pair)), tmp_path / name, callbacks, save_steps=1)
        with caplog.at_level(logging.WARNING, "csulora_callback"):
            trainer.train()
        assert trainer.state.global_step == 8

    for step in range(1, 9):
        folder, twin = (tmp_path / name / f"checkpoint-{step}" for name in ("with", "without"))
        saved, raw = (
            load_file(folder / file) for file in ("adapter_model.safetensors", "csulora/raw/adapter_model.safetensors")
        )
        trained = load_file(twin / "adapter_model.safetensors")
        record = json.loads((folder / "csulora" / "correction.json").read_text())
        assert record["status"] == (
            "corrected" if step < 3 else "not corrected: the factors, or activations with them, hold NaN or Inf"
        )
        assert bool(record["metrics"]) == (step < 3)
        for key in trained:
            assert torch.equal(raw[key].view(torch.int32), trained[key].view(torch.int32)), (step, key)
            if step >= 3:
                assert torch.equal(saved[key].view(torch.int32), raw[key].view(torch.int32)), (step, key)
        assert any(value.isnan().any() for value in saved.values()) == (step >= 3)
    warnings = [record.message for record in caplog.records if record.name.startswith("csulora_callback")]
    assert len(warnings) == 1
    assert_says(warnings[0], "NaN or Inf", "raw adapter, not a corrected one", "its record says so")
    losses = [record for record in trainer.state.log_history if "loss" in record]
    assert ["csulora/update_norm" in record for record in losses] == [True, True] + [False] * 6


def test_a_subspace_of_other_weights_is_refused_and_one_of_another_dtype_is_doubted(pair, tmp_path, caplog):
    base, _ = pair
    other = SafetySubspace.estimate(base, align(tiny_llama(), seed=9), TARGETS, rank=2, progress=False)
    with pytest.raises(ValueError, match=r"the fingerprint of the weights it was estimated from .* is another"):
        make_trainer(with_lora(aligned_model(pair)), tmp_path, [CSULoRACallback(subspace=other)]).train()
    narrow = SafetySubspace.estimate(base, align(tiny_llama()).bfloat16(), TARGETS, rank=2, progress=False)
    assert "what the narrower dtype rounded away counts as displacement" in caplog.text
    make_trainer(with_lora(aligned_model(pair)), tmp_path, [CSULoRACallback(subspace=narrow)]).train()
    assert "whether they are the same checkpoint cannot be checked" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base_model": 3}, "`base_model`: expected a path, a Hub id or a Module, but got 3."),
        ({"base_model": ""}, "`base_model`: expected a path, a Hub id or a Module, but got ''."),
        ({"base_model": "a/b", "aligned_model": []}, "`aligned_model`: expected a path, a Hub id or a Module"),
        ({"subspace": {}}, "`subspace`: expected a path, a Hub id or a SafetySubspace, but got {}."),
        ({"base_model": "a/b", "every_n_steps": True}, "`every_n_steps`: expected a number of steps ≥ 1 or None"),
    ],
)
def test_arguments_of_another_type(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        CSULoRACallback(**arguments)


def test_raw_factors_that_were_changed_are_not_resumed_from(pair, subspace, tmp_path):
    def trainer():
        return make_trainer(with_lora(aligned_model(pair)), tmp_path, [CSULoRACallback(subspace=subspace)])

    trainer().train()
    raw = tmp_path / "checkpoint-8" / "csulora" / "raw" / "adapter_model.safetensors"
    save_file({key: 3 * tensor for key, tensor in load_file(raw).items()}, raw)
    with pytest.raises(ValueError, match=r"csulora: expected the files that correction\.json there records"):
        trainer().train(resume_from_checkpoint=True)
