"""The callback over quantized bases, made by the real libraries: corrected by the full-precision files under them.

What a checkpoint holds is compared with `correct` on the raw factors, and a subspace from a dense SVD of the weights
that transformers loads from the same folders in full precision.
"""

import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from csulora_callback import CSULoRACallback, Penalty, SafetySubspace, correct_adapter
from csulora_callback.models.adapters import find_adapter
from csulora_callback.models.checksum import checksum, weights_besides
from csulora_callback.models.reading import evaluating
from csulora_callback.models.under_adapter import NoFullPrecision, quantized_layers
from tests.helpers.huggingface import losses
from tests.helpers.lab import (
    PENALTY,
    RANK,
    TARGETS,
    Tokens,
    assert_same,
    make_trainer,
    raw,
    saved,
    saved_pair,
    tiny_llama,
    with_lora,
)
from tests.helpers.quantized import (
    EmptyWeightLinear,
    PackedLinear,
    assert_corrected,
    by_torchao,
    in_eight_bits,
    in_four_bits,
    packed,
    quantized,
    unquantized,
)

SKIPPED = ["model.layers.0", "lm_head"]  # so that the first adapted layer is not quantized, and others are

KINDS: dict[str, Callable] = {
    "nf4": in_four_bits,
    # The default of LLaMA-Factory and axolotl.
    "nf4 in bfloat16, double": lambda: in_four_bits(
        bnb_4bit_quant_storage=torch.bfloat16, bnb_4bit_use_double_quant=True
    ),
    "fp4 in float32": lambda: in_four_bits(bnb_4bit_quant_type="fp4", bnb_4bit_quant_storage=torch.float32),
    "int8": in_eight_bits,
    "nf4, the first layers skipped": lambda: in_four_bits(llm_int8_skip_modules=SKIPPED),
    "int8, the first layers skipped": lambda: in_eight_bits(llm_int8_skip_modules=SKIPPED),
    "torchao int8": by_torchao,
    "torchao int8, the first layers skipped": lambda: by_torchao(modules_to_not_convert=SKIPPED),
    "gpt2 in nf4": in_four_bits,
    "gpt2 in int8": in_eight_bits,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """By kind, once each: the same training without the callback, with it, and with it resumed from its middle."""
    done = {}

    def run(name: str) -> SimpleNamespace:
        if name not in done:
            config, folder = KINDS[name](), tmp_path_factory.mktemp("quantized")
            base, aligned = saved_pair(folder, unquantized(name))
            targets = ["c_attn", "c_proj"] if name.startswith("gpt2") else TARGETS
            # Dropout draws from the global generator at every step: one stray draw by the callback would show.
            lora = {"target_modules": targets, "lora_dropout": 0.1}
            runs = {}
            for kind in ("without", "with", "resumed"):
                callbacks = [] if kind == "without" else [CSULoRACallback(base, rank=RANK, penalty=PENALTY)]
                trainer = make_trainer(
                    quantized(aligned, config, **lora), folder / kind, callbacks, max_steps=4, save_steps=2
                )
                if kind == "resumed":
                    shutil.copytree(folder / "with/checkpoint-2", folder / kind / "checkpoint-2")
                trainer.train(resume_from_checkpoint=kind == "resumed" or None)
                runs[kind] = trainer
            done[name] = SimpleNamespace(config=config, folder=folder, base=base, aligned=aligned, runs=runs)
        return done[name]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_a_checkpoint_is_corrected_by_the_weights_in_full_precision(trained, name):
    run = trained(name)
    stored = quantized_layers(find_adapter(run.runs["with"].model))
    assert stored
    if "skipped" in name:
        assert all(".layers.1." in layer for layer in stored)
    for step in (2, 4):
        checkpoint = run.folder / f"with/checkpoint-{step}"
        assert_corrected(saved(checkpoint), raw(checkpoint), run.base, run.aligned)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_training_is_bit_identical_and_resuming_exact(trained, name):
    run = trained(name)
    assert losses(run.runs["with"]) == losses(run.runs["without"])
    for step in (2, 4):
        checkpoint = f"checkpoint-{step}"
        assert_same(raw(run.folder / "with" / checkpoint), saved(run.folder / "without" / checkpoint))
    assert losses(run.runs["resumed"]) == losses(run.runs["without"])
    assert_same(raw(run.folder / "resumed/checkpoint-4"), raw(run.folder / "with/checkpoint-4"))
    assert_same(saved(run.folder / "resumed/checkpoint-4"), saved(run.folder / "with/checkpoint-4"))


RELOAD = """
import pickle, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

with open(sys.argv[1], "rb") as file:
    config = pickle.load(file)
model = AutoModelForCausalLM.from_pretrained(sys.argv[2], quantization_config=config, device_map="cpu")
model = PeftModel.from_pretrained(model, sys.argv[3])
torch.save({key: value for key, value in model.state_dict().items() if ".lora_" in key}, sys.argv[4])
assert not any(name.startswith("csulora") for name in sys.modules)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nf4 in bfloat16, double", "int8", "torchao int8", "gpt2 in nf4"])
def test_peft_alone_in_a_new_process_loads_what_ships(trained, name, tmp_path):
    run = trained(name)
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(run.config))
    checkpoint = run.folder / "with/checkpoint-4"
    places = (tmp_path / "config.pickle", run.aligned, checkpoint, tmp_path / "loaded.pt")
    subprocess.run([sys.executable, "-c", RELOAD, *map(str, places)], check=True)
    loaded = {key.replace(".default", ""): value.float() for key, value in torch.load(tmp_path / "loaded.pt").items()}
    assert_same(loaded, saved(checkpoint))
    live = {
        key.replace(".default", ""): value
        for key, value in run.runs["with"].model.state_dict().items()
        if ".lora_" in key
    }
    assert_same(live, loaded)


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    """A pair, and its aligned model saved again as it is in 4 bits, in a float type."""
    folder = tmp_path_factory.mktemp("on_disk")
    base, aligned = saved_pair(folder, unquantized("llama"))
    config = in_four_bits(bnb_4bit_quant_storage=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(aligned, quantization_config=config, device_map="cpu")
    model.save_pretrained(folder / "four_bits")
    return SimpleNamespace(base=base, aligned=aligned, four_bits=folder / "four_bits")


def loaded(folder: Path) -> PeftModel:
    return with_lora(AutoModelForCausalLM.from_pretrained(folder, device_map="cpu"))


def test_a_checkpoint_that_is_quantized_on_the_disk_is_refused_with_what_to_pass(on_disk, tmp_path):
    trainer = make_trainer(loaded(on_disk.four_bits), tmp_path, [CSULoRACallback(on_disk.base, rank=RANK)])
    with pytest.raises(NoFullPrecision) as refused:
        trainer.train()
    assert str(refused.value) == (
        "`aligned_model`: expected the aligned weights in full precision, but 6 of the 6 adapted layers are quantized "
        "('model.layers.0.self_attn.q_proj': Params4bit of torch.bfloat16), and so are the files in "
        f"{on_disk.four_bits} (packed, with absmax, quant_map, quant_state.bitsandbytes__nf4). Pass "
        "aligned_model='org/model', the folder or Hub id of the checkpoint that was quantized."
    )
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.slow
def test_with_the_checkpoint_that_was_quantized_it_is_corrected(on_disk, tmp_path):
    callback = CSULoRACallback(on_disk.base, on_disk.aligned, rank=RANK, penalty=PENALTY)
    make_trainer(loaded(on_disk.four_bits), tmp_path, [callback], max_steps=2, save_steps=2).train()
    checkpoint = tmp_path / "checkpoint-2"
    assert_corrected(saved(checkpoint), raw(checkpoint), on_disk.base, on_disk.aligned)


@pytest.mark.slow
def test_with_a_subspace_nothing_is_needed_and_what_cannot_be_checked_is_said(on_disk, tmp_path, caplog):
    subspace = SafetySubspace.estimate(on_disk.base, on_disk.aligned, TARGETS, rank=RANK, progress=False)
    callback = CSULoRACallback(subspace=subspace, penalty=PENALTY)
    make_trainer(loaded(on_disk.four_bits), tmp_path / "run", [callback], max_steps=2, save_steps=2).train()
    checkpoint = tmp_path / "run/checkpoint-2"
    assert_corrected(saved(checkpoint), raw(checkpoint), on_disk.base, on_disk.aligned)
    assert "Whether the subspace is one of the model in use cannot be checked. `aligned_model`: exp" in caplog.text
    with pytest.raises(ValueError, match=r"is quantized \(packed, with absmax.*unquantized checkpoint"):
        correct_adapter(checkpoint, subspace, tmp_path / "out", PENALTY, aligned_model=on_disk.four_bits)


@pytest.mark.slow
def test_a_subspace_of_another_model_is_found_out_by_the_files(on_disk, tmp_path):
    """Which nothing in memory could tell."""
    other = SafetySubspace.estimate(on_disk.aligned, on_disk.base, TARGETS, rank=RANK, progress=False)
    model = quantized(on_disk.aligned, in_four_bits())
    trainer = make_trainer(model, tmp_path, [CSULoRACallback(subspace=other, penalty=PENALTY)])
    with pytest.raises(ValueError, match="`subspace`: expected one of the aligned model in use"):
        trainer.train()


def test_two_checkpoints_that_are_quantized_alike_are_refused(on_disk):
    """Their packed weights have one shape and a float type: of them a subspace of nonsense could be estimated."""
    with pytest.raises(ValueError, match=r"is quantized \(packed, with absmax.*unquantized checkpoint"):
        SafetySubspace.estimate(on_disk.four_bits, on_disk.four_bits, TARGETS, progress=False)


@pytest.mark.parametrize("config", [in_four_bits, in_eight_bits, by_torchao])
def test_a_digest_sees_the_scales_and_stays_the_same(config, tmp_path):
    """A model of twice the weights has the same packed numbers, and other scales."""
    digests = []
    for factor in (1.0, 2.0):
        torch.manual_seed(0)
        model = tiny_llama(hidden_size=64, intermediate_size=128)
        with torch.no_grad():
            for layer in model.model.layers:
                layer.mlp.down_proj.weight *= factor
        model.save_pretrained(tmp_path / str(factor))
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / str(factor), quantization_config=config(), device_map="cpu"
        )
        digests.append(checksum(weights_besides(model, [])))
        with torch.no_grad(), evaluating(model):
            model(Tokens(count=2).tokens)  # after which bitsandbytes keeps the scales of 8 bits elsewhere
        assert checksum(weights_besides(model, [])) == digests[-1]
    assert digests[0] != digests[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nf4 in bfloat16, double", "int8", "torchao int8"])
def test_probes_and_data_aware_penalties_read_the_model_as_it_is(trained, name, tmp_path, caplog):
    run = trained(name)
    probes = Tokens(count=8, length=6, seed=9).tokens.tolist()
    for attempt in ("first", "second"):
        callback = CSULoRACallback(
            run.base, rank=RANK, penalty=Penalty.data_aware(10.0), probes=probes, cache_dir=tmp_path / "cache"
        )
        model = quantized(run.aligned, run.config, lora_dropout=0.1)
        trainer = make_trainer(model, tmp_path / attempt, [callback], max_steps=4, save_steps=2)
        trainer.train()
    without = run.folder / "without/checkpoint-4"
    for attempt in ("first", "second"):
        checkpoint = tmp_path / attempt / "checkpoint-4"
        assert_same(raw(checkpoint), saved(without))
        assert_same(saved(checkpoint), saved(tmp_path / "first/checkpoint-4"))
        assert any(not torch.equal(saved(checkpoint)[key], value) for key, value in raw(checkpoint).items())
    assert len(list((tmp_path / "cache").glob("answers-*"))) == 1  # the second run knew the model by its digest
    assert sum("csulora/refusal_kept_corrected" in record for record in trainer.state.log_history) == 2


@pytest.mark.parametrize("kind", [PackedLinear, pytest.param(EmptyWeightLinear, marks=pytest.mark.slow)])
def test_layers_without_a_weight_are_corrected_by_the_files_under_them(pair, tmp_path, kind):
    for output, callbacks in (("without", []), ("with", [CSULoRACallback(pair[0], rank=RANK, penalty=PENALTY)])):
        make_trainer(packed(pair[1], kind), tmp_path / output, callbacks, max_steps=2, save_steps=2).train()
    checkpoint = tmp_path / "with/checkpoint-2"
    assert_corrected(saved(checkpoint), raw(checkpoint), *pair)
    assert_same(raw(checkpoint), saved(tmp_path / "without/checkpoint-2"))
