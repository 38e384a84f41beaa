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
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora.gptq import GPTQLoraLinear
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel, TorchAoConfig
from transformers.pytorch_utils import Conv1D

from csulora_callback import CSULoRACallback, Penalty, SafetySubspace, correct, correct_adapter
from csulora_callback.models.adapters import find_adapter
from csulora_callback.models.checkpoint import open_checkpoint
from csulora_callback.models.checksum import checksum, weights_besides
from csulora_callback.models.reading import evaluating
from csulora_callback.models.under_adapter import NoFullPrecision, quantized_layers, weights_under
from tests.helpers.huggingface import losses
from tests.helpers.lab import (
    PENALTY,
    RANK,
    SCALING,
    TARGETS,
    VOCABULARY,
    Tokens,
    assert_same,
    make_trainer,
    raw,
    saved,
    saved_pair,
    tiny_llama,
    with_lora,
)

SKIPPED = ["model.layers.0", "lm_head"]  # so that the first adapted layer is not quantized, and others are


def in_four_bits(**options) -> BitsAndBytesConfig:
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_4bit=True, **{"bnb_4bit_quant_type": "nf4", **options})


def in_eight_bits(**options) -> BitsAndBytesConfig:
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_8bit=True, **options)


def by_torchao(**options) -> TorchAoConfig:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(quant_type=Int8WeightOnlyConfig(), **options)


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


def unquantized(name: str) -> nn.Module:
    if not name.startswith("gpt2"):
        return tiny_llama(hidden_size=64, intermediate_size=128)
    torch.manual_seed(0)
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=32, **special)
    )


def quantized(folder: Path, config, **lora) -> PeftModel:
    """The model in a folder quantized on loading, as QLoRA's recipes prepare it, with a fresh adapter."""
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")
    return with_lora(prepare_model_for_kbit_training(model, use_gradient_checkpointing=False), **lora)


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


@torch.no_grad()
def matrices(folder: Path) -> dict[str, torch.Tensor]:
    """Weights of linear modules in float64 as ``(d_out, d_in)``, by module name, read by transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder).double()
    return {
        name: module.weight.T if isinstance(module, Conv1D) else module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }


def updates(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``B·A`` in float64 by module name."""
    return {
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): (
            state[key.replace("lora_A", "lora_B")].double() @ lora_A.double()
        )
        for key, lora_A in state.items()
        if ".lora_A." in key
    }


def assert_corrected(corrected: dict, raw: dict, base: Path, aligned: Path) -> None:
    """What is saved is the correction of what was trained, by the displacement of the weights in full precision."""
    written, base, aligned = updates(corrected), matrices(base), matrices(aligned)
    assert written
    for name, update in updates(raw).items():
        U, _, Vh = torch.linalg.svd(aligned[name] - base[name])
        lora_A, lora_B = (raw[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
        by_hand = correct(lora_A, lora_B, U[:, :RANK], Vh[:RANK].T, PENALTY, SCALING)
        expected = by_hand.lora_B @ by_hand.lora_A
        assert (written[name] - expected).norm() < 1e-5 * expected.norm(), name
        assert (written[name] - update).norm() > 0.1 * update.norm(), name


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


class PackedLinear(nn.Module):
    """A layer as GPTQ's: whole numbers of 4 bits in int32 and scales under names of their own, and no ``weight``."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        scales = linear.weight.detach().abs().amax(1, keepdim=True) / 7
        codes = (linear.weight.detach() / scales).round().to(torch.int32) + 8
        packed = torch.zeros(self.out_features, self.in_features // 8, dtype=torch.int32)
        for place in range(8):
            packed |= codes[:, place::8] << 4 * place
        self.register_buffer("qweight", packed)
        self.register_buffer("scales", scales)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        codes = torch.stack([(self.qweight >> 4 * place) & 15 for place in range(8)], dim=-1)
        weight = (codes.flatten(1) - 8) * self.scales
        return nn.functional.linear(x, weight)


class EmptyWeightLinear(PackedLinear):
    """A layer as HQQ's, whose ``weight`` is there for those who ask for its dtype, and holds nothing."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.W_q = nn.Parameter(self.qweight, requires_grad=False)

    @property
    def weight(self) -> torch.Tensor:
        return torch.empty(0)


LOOKS = {PackedLinear: "qweight, scales", EmptyWeightLinear: "W_q, qweight, scales"}


def packed(folder: Path, kind: type[PackedLinear]) -> PeftModel:
    """PEFT's own layer for GPTQ over packed ones, with the library that makes them not installed."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    for name, module in list(model.named_modules()):
        if name.endswith(tuple(TARGETS)):
            model.set_submodule(name, kind(module))
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, lora_dropout=0.1, task_type="CAUSAL_LM")
    config._register_custom_module({kind: GPTQLoraLinear})
    torch.manual_seed(2)
    return get_peft_model(model, config)


@pytest.mark.parametrize("kind", [PackedLinear, pytest.param(EmptyWeightLinear, marks=pytest.mark.slow)])
def test_layers_without_a_weight_are_corrected_by_the_files_under_them(pair, tmp_path, kind):
    for output, callbacks in (("without", []), ("with", [CSULoRACallback(pair[0], rank=RANK, penalty=PENALTY)])):
        make_trainer(packed(pair[1], kind), tmp_path / output, callbacks, max_steps=2, save_steps=2).train()
    checkpoint = tmp_path / "with/checkpoint-2"
    assert_corrected(saved(checkpoint), raw(checkpoint), *pair)
    assert_same(raw(checkpoint), saved(tmp_path / "without/checkpoint-2"))


@pytest.mark.parametrize("kind", LOOKS)
def test_files_of_packed_weights_are_named_as_what_they_are(pair, tmp_path, kind):
    """GPTQ's on the disk: other names for the weights, and a config that says so."""
    config = AutoModelForCausalLM.from_pretrained(pair[1]).config
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    model = packed(pair[1], kind)
    config.save_pretrained(tmp_path / "gptq")
    state = {key.replace(".base_layer", ""): value for key, value in model.get_base_model().state_dict().items()}
    torch.save(
        {key: value for key, value in state.items() if ".lora_" not in key}, tmp_path / "gptq/pytorch_model.bin"
    )
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "gptq")
    with pytest.raises(NoFullPrecision) as refused:
        weights_under(find_adapter(model))
    message = str(refused.value)
    assert "6 of the 6 adapted layers are quantized" in message
    assert f"('model.layers.0.self_attn.q_proj': {kind.__name__} with {LOOKS[kind]})" in message
    assert f"so are the files in {tmp_path / 'gptq'} (packed, with {LOOKS[kind]}). Pass aligned_model=" in message
    with pytest.raises(ValueError, match=r"q_proj' is quantized \(packed, with .*qweight, .*unquantized checkpoint"):
        SafetySubspace.estimate(pair[0], tmp_path / "gptq", ["model.layers.0.self_attn.q_proj"], progress=False)


@pytest.mark.parametrize("source", [None, "no/such"])
def test_a_model_that_was_loaded_from_nowhere_is_refused(pair, monkeypatch, source):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = packed(pair[1], PackedLinear)
    model.peft_config["default"].base_model_name_or_path = source
    with pytest.raises(NoFullPrecision) as refused:
        weights_under(find_adapter(model))
    why = "its files cannot be had (no/such: not a local folder" if source else "the adapter's config names no checkp"
    assert why in str(refused.value)


def test_of_a_hub_id_the_revision_in_the_adapters_config_counts(pair, tmp_path, monkeypatch):
    repo = tmp_path / "models--some-org--some-model"
    (repo / "refs").mkdir(parents=True)
    for place, (ref, folder) in enumerate(zip(("main", "v2"), pair, strict=True)):
        shutil.copytree(folder, repo / "snapshots" / (str(place) * 40))
        (repo / "refs" / ref).write_text(str(place) * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = packed(pair[1], PackedLinear)
    config = model.peft_config["default"]
    config.base_model_name_or_path = "some-org/some-model"
    for revision, folder in zip((None, "v2"), pair, strict=True):
        config.revision = revision
        adapter = find_adapter(model)
        expected = open_checkpoint(folder).fingerprint(adapter.layers)
        assert weights_under(adapter).fingerprint(adapter.layers) == expected
