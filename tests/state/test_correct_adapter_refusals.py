"""What cannot be corrected from its files, and outputs that are not free, are refused by name; nothing is written."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from peft import IA3Config, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from csulora_callback import Penalty, SafetyCorrector, correct_adapter, restore_adapter
from tests.helpers.huggingface import fresh_model
from tests.helpers.lab import PENALTY, saved, tiny_llama, with_lora

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def plain(pair, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    fresh_model(pair, init_lora_weights=False).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(plain, tmp_path) -> Path:
    return shutil.copytree(plain, tmp_path / "copy")


@pytest.fixture
def corrected(pair, subspace, tmp_path) -> Path:
    model = fresh_model(pair, init_lora_weights=False)
    corrector = SafetyCorrector(model, subspace, PENALTY)
    with corrector.corrected() as adapter:
        model.save_pretrained(tmp_path / "corrected")
    adapter.sidecar.save(tmp_path / "corrected", corrector.adapter.config)
    return tmp_path / "corrected"


def refusal(folder, subspace, tmp_path, message: str, error=ValueError, **arguments) -> None:
    settings = {"output": tmp_path / "out", "penalty": PENALTY, **arguments}
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=message):
        correct_adapter(folder, subspace, **settings)
    assert sorted(tmp_path.rglob("*")) == before


def change(folder: Path, **options) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))


def put(folder: Path, **tensors) -> None:
    save_file({**load_file(folder / WEIGHTS), **tensors}, folder / WEIGHTS)


OPTIONS = {
    "use_dora": True,
    "alora_invocation_tokens": [3],
    "arrow_config": {"top_k": 3},
    "layer_replication": [[0, 2]],
    "init_lora_weights": "pissa",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("option", OPTIONS)
def test_options_that_change_more_than_the_factors(copy, subspace, tmp_path, option):
    change(copy, **{option: OPTIONS[option]})
    refusal(copy, subspace, tmp_path, rf"`adapter`: LoRA with {option}.* is not supported")


@pytest.mark.filterwarnings("ignore")
def test_an_option_that_only_a_newer_peft_knows_is_judged_by_its_tensors(copy, subspace, tmp_path):
    change(copy, use_something_new=True)
    correct_adapter(copy, subspace, tmp_path / "a", PENALTY)
    assert json.loads((tmp_path / "a" / CONFIG).read_text())["use_something_new"] is True
    put(copy, **{f"{Q}.lora_new": torch.ones(2, 2)})
    refusal(copy, subspace, tmp_path, r"q_proj': a variant of LoRA is not supported", output=tmp_path / "b")


def test_options_whose_tensors_are_not_there(copy, subspace, tmp_path):
    for option, value in {"modules_to_save": ["lm_head"], "trainable_token_indices": [3]}.items():
        change(copy, **{"modules_to_save": None, option: value})
        refusal(copy, subspace, tmp_path, f"expected the weights of {option}=.*, which stands in the config there")


TENSORS = {
    f"{Q}.lora_magnitude_vector": (torch.ones(16), r"q_proj': DoRA \(use_dora=True\) is not supported"),
    f"{Q}.lora_B.bias": (torch.ones(16), "expected no bias of lora_B for module '.*q_proj', as .*lora_bias=False"),
    f"{Q}.lora_embedding_A": (torch.ones(4, 32), "q_proj' has LoRA factors of both"),
    "base_model.model.model.embed_tokens.lora_embedding_A": (
        torch.ones(4, 32),
        "expected the LoRA factor '.*embed_tokens.lora_embedding_B'",
    ),
    f"{Q}.bias": (torch.ones(16), "at most the model's embeddings beside them, but got '.*q_proj.bias'"),
    f"{Q}.weight": (torch.ones(16, 16), "at most the model's embeddings beside them, but got '.*q_proj.weight'"),
    "base_model.model.model.norm.weight": (torch.ones(16), "but got 'base_model.model.model.norm.weight'"),
    "base_model.model.lm_head.modules_to_save.weight": (torch.ones(32, 16), "lm_head': modules_to_save is not"),
    "base_model.model.model.conv.lora_A.weight": (torch.ones(4, 3, 3, 3), "conv': LoRA on a convolution is not"),
    "base_model.model.model.x.lora_A.weight": (torch.ones(4, 16), "expected the LoRA factor '.*x.lora_B.weight'"),
}


@pytest.mark.parametrize("key", TENSORS)
def test_tensors_that_are_no_factors(copy, subspace, tmp_path, key):
    tensor, message = TENSORS[key]
    put(copy, **{key: tensor})
    refusal(copy, subspace, tmp_path, message)


def test_three_matrices_or_two_of_different_shapes_are_not_embeddings(copy, subspace, tmp_path):
    head = "base_model.model.lm_head"
    put(copy, **{f"{head}.weight": torch.ones(32, 16), f"{head}.bias": torch.ones(32)})
    correct_adapter(copy, subspace, tmp_path / "fine", PENALTY)
    put(copy, **{"base_model.model.score.weight": torch.ones(2, 16)})
    refusal(copy, subspace, tmp_path, "expected LoRA factors, and at most the model's embeddings")


def test_other_tuners_and_factors_that_do_not_fit(pair, copy, subspace, tmp_path):
    config = IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    get_peft_model(AutoModelForCausalLM.from_pretrained(pair[1]), config).save_pretrained(tmp_path / "ia3")
    refusal(tmp_path / "ia3", subspace, tmp_path, "`adapter`: expected an adapter of LoraConfig, but got one of IA3")
    change(copy, r=8)
    refusal(copy, subspace, tmp_path, r"`adapter`: expected factors of rank 8 for module 'model.layers.0.mlp.down_p")
    change(copy, r=4)
    put(copy, **{f"{Q}.lora_A.weight": torch.full((4, 16), math.nan)})
    refusal(copy, subspace, tmp_path, "`adapter`: expected finite factors, but those in .*copy hold NaN or Inf")


def test_a_subspace_that_lacks_a_module_or_is_of_another_shape(copy, subspace, tmp_path):
    put(copy, **{f"base_model.model.x.lora_{side}.weight": torch.ones(4, 4) for side in "AB"})
    refusal(copy, subspace, tmp_path, "`subspace`: expected a basis for the adapted module 'x'")
    with_lora(tiny_llama(hidden_size=24), init_lora_weights=False).save_pretrained(tmp_path / "wide")
    refusal(tmp_path / "wide", subspace, tmp_path, "`subspace`: module 'model.layers.0.mlp.down_proj' is 24 × 24")
    refusal(copy, 3, tmp_path, "`subspace`: expected a SafetySubspace or the path of a saved one, but got 3")
    refusal(copy, tmp_path / "none", tmp_path, "none", error=FileNotFoundError)


def test_what_cannot_be_read(copy, subspace, tmp_path):
    refusal(tmp_path / "a/b/c", subspace, tmp_path, "`adapter`: .*but it is neither", error=FileNotFoundError)
    refusal("", subspace, tmp_path, "`adapter`: expected a folder, a Lightning checkpoint or a Hub id, but got ''")
    (tmp_path / "empty").mkdir()
    refusal(tmp_path / "empty", subspace, tmp_path, "adapter_config.json, but .* has none", error=FileNotFoundError)
    weights, config = (copy / WEIGHTS).read_bytes(), (copy / CONFIG).read_text()
    (copy / WEIGHTS).write_bytes(weights[:100])
    refusal(copy, subspace, tmp_path, "its weights cannot be read")
    (copy / WEIGHTS).unlink()
    refusal(copy, subspace, tmp_path, "expected the weights of a LoRA adapter, but found none", FileNotFoundError)
    (copy / WEIGHTS).write_bytes(weights)
    (copy / CONFIG).write_text("{}")
    refusal(copy, subspace, tmp_path, "`adapter`: expected an adapter of LoraConfig, but got one of PeftConfig")
    for text in ("", "[]", "[" * 100_000, '{"peft_type": "NOTHING"}', config[:60]):
        (copy / CONFIG).write_text(text)
        refusal(copy, subspace, tmp_path, f"{CONFIG}: expected the config of a PEFT adapter")


def test_a_damaged_or_foreign_record_is_not_taken_for_none(corrected, subspace, tmp_path):
    raw = corrected / "csulora/raw" / WEIGHTS
    content = raw.read_bytes()
    raw.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refusal(corrected, subspace, tmp_path, "`adapter`: expected the raw factors of .* delete the csulora/")
    raw.write_bytes(content)
    save_file({key: 2 * value for key, value in saved(corrected).items()}, corrected / WEIGHTS)
    refusal(corrected, subspace, tmp_path, "`adapter`: expected the raw factors .*that is another one: it was saved")
    (corrected / "csulora/correction.json").unlink()
    refusal(corrected, subspace, tmp_path, "`adapter`: expected the raw factors .*correction.json: not there")
    with pytest.raises(ValueError, match="`checkpoint`: expected the raw factors of"):
        restore_adapter(corrected, tmp_path / "out")
    shutil.rmtree(corrected / "csulora")
    assert not correct_adapter(corrected, subspace, tmp_path / "out", PENALTY).from_raw


def test_outputs_that_are_not_free(copy, corrected, subspace, tmp_path):
    outside = r"`output`: expected a folder outside of the adapter's"
    (tmp_path / "link").symlink_to(copy)
    for output in (copy, copy / "corrected", tmp_path / "link", tmp_path / "other/../copy"):
        refusal(copy, subspace, tmp_path, outside, output=output)
    there = r"`output`: expected a folder that does not exist yet, or is empty, but .* is there"
    for output in (tmp_path, corrected, copy.parent):
        refusal(copy, subspace, tmp_path, there, output=output)
    (tmp_path / "file").write_text("")
    refusal(copy, subspace, tmp_path, there, output=tmp_path / "file")
    with pytest.raises(ValueError, match=there):
        restore_adapter(corrected, copy)
    with pytest.raises(ValueError, match=outside):
        restore_adapter(corrected, corrected)
    refusal(copy, subspace, tmp_path, "`output`: expected the path of a folder, but got ''", output="")
    (tmp_path / "new").mkdir()
    (tmp_path / "also").symlink_to(tmp_path / "new")
    assert correct_adapter(copy, subspace, tmp_path / "also", PENALTY).output == tmp_path / "new"
    assert (tmp_path / "new" / WEIGHTS).is_file()


def test_arguments_out_of_range(copy, subspace, tmp_path):
    refusal(copy, subspace, tmp_path, "`rank`: expected 'truncate' or 'expand', but got 'both'", rank="both")
    refusal(copy, subspace, tmp_path, "`penalty`: expected a Penalty such as", penalty="guard")


def test_a_write_that_fails_leaves_nothing(copy, subspace, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr("csulora_callback.models.peft_folder.save_file", fail)
    refusal(copy, subspace, tmp_path, "no space left", error=OSError)


def test_an_update_beyond_its_dtype_is_refused_with_its_module(copy, subspace, tmp_path):
    huge = {key: torch.full_like(value, 6e4).half() for key, value in load_file(copy / WEIGHTS).items()}
    save_file(huge, copy / WEIGHTS)
    refusal(copy, subspace, tmp_path, "module 'model.layers.0", penalty=Penalty.table(aligned=0.1, off=0.2))
