"""What other trainers and models train beside LoRA: TRL's, Lightning's, those of images."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tokenizers import models
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
)
from trl import RewardConfig, RewardTrainer

from csulora_callback import Penalty, SafetySubspace, correct
from csulora_callback.method.token_space import input_gain
from csulora_callback.models.adapters import find_adapter
from csulora_callback.models.factors import from_peft_state_dict
from tests.helpers import lightning as in_lightning
from tests.helpers import trl as in_trl
from tests.helpers.beside import by_hand, key, saved
from tests.helpers.huggingface import callback, losses
from tests.helpers.lab import (
    PENALTY,
    RANK,
    TARGETS,
    TRAINING,
    align,
    assert_same,
    make_trainer,
    raw,
    saved_pair,
    tiny_llama,
    with_lora,
)

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def assert_lora_is_corrected(checkpoint: Path, pair, names: list[str]) -> None:
    """By hand, with a subspace out of dense factorizations of what transformers loads."""
    written, trained = saved(checkpoint), raw(checkpoint)
    subspace = SafetySubspace.estimate(*pair, target_modules=names, rank=RANK, method="exact", progress=False)
    found = from_peft_state_dict(written, names, "")
    for name, (lora_A, lora_B) in from_peft_state_dict(trained, names, "").items():
        done = correct(lora_A, lora_B, subspace[name].U, subspace[name].V, PENALTY, 2.0)
        for got, expected in zip(found[name], done.factors, strict=True):
            torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


def test_a_reward_model_in_trl(pair, tmp_path):
    in_trl.words().save_pretrained(pair[1])
    pairs = Dataset.from_dict(
        {"chosen": [f"word{i} word{i + 1} word2" for i in range(16)], "rejected": [f"word{i}" for i in range(16)]}
    )

    def train(output: Path, callbacks: list):
        torch.manual_seed(6)
        trainer = RewardTrainer(
            model=AutoModelForSequenceClassification.from_pretrained(pair[1], num_labels=1),
            args=RewardConfig(
                **{**TRAINING, "output_dir": str(output), "max_steps": 4, "save_steps": 4, "bf16": False}
            ),
            train_dataset=pairs,
            processing_class=PreTrainedTokenizerFast.from_pretrained(pair[1]),
            peft_config=LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=TARGETS),
            callbacks=callbacks,
        )
        trainer.train()
        return trainer

    without, with_it = train(tmp_path / "without", []), train(tmp_path / "with", [callback(pair)])
    assert losses(with_it) == losses(without)
    checkpoint = tmp_path / "with/checkpoint-4"
    assert_same(raw(checkpoint), saved(tmp_path / "without/checkpoint-4"))
    assert_lora_is_corrected(checkpoint, pair, list(find_adapter(with_it.model).layers))
    record = json.loads((checkpoint / "csulora/correction.json").read_text())
    assert record["not_corrected"] == {"score": "new: the aligned checkpoint has no such module"}


def test_tokens_that_trl_adds_to_take_a_chat_template(pair, tmp_path):
    """Its user asks for a template, and gets trained tokens and a trained head."""
    words = in_trl.words()
    words.save_pretrained(pair[1])
    words.add_tokens(["<user>"])
    words.chat_template = "<bos> <user> {{ messages[0]['content'] }}"
    words.save_pretrained(tmp_path / "chat")

    def train(output: Path, callbacks: list):
        arguments = {"chat_template_path": str(tmp_path / "chat"), "max_steps": 4}
        torch.manual_seed(6)
        trainer = in_trl.make_trainer(pair, output, callbacks, **arguments)
        trainer.train()
        return trainer

    without = train(tmp_path / "without", [])
    with_it = train(tmp_path / "with", [callback(pair)])
    assert with_it.model.peft_config["default"].trainable_token_indices is not None
    assert losses(with_it) == losses(without)
    checkpoint = tmp_path / "with/checkpoint-4"
    trained, written = saved(tmp_path / "without/checkpoint-4"), saved(checkpoint)
    assert_same(raw(checkpoint), trained)
    expected = by_hand("lm_head", trained[key("lm_head")], pair, PENALTY)
    torch.testing.assert_close(written[key("lm_head")].double(), expected, atol=2e-6, rtol=0)
    rows = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    assert torch.equal(written[rows], trained[rows])
    listed = json.loads((checkpoint / "csulora/correction.json").read_text())["not_corrected"]
    assert set(listed) == {"model.embed_tokens", "lm_head, rows 32 to 63"}  # TRL rounds up to 64


def test_rows_that_a_vocabulary_is_padded_with_are_new_tokens(pair, tmp_path):
    """The file has the row, and its tokenizer no such token."""
    model = with_lora(AutoModelForCausalLM.from_pretrained(pair[1]), trainable_token_indices=[31])
    with pytest.raises(ValueError, match=r"of tokens that the aligned model has \(such as 31; 1 of 1"):
        find_adapter(model)
    words = in_trl.words().get_vocab()
    tokenizer = in_trl.words().backend_tokenizer
    tokenizer.model = models.WordLevel({word: index for word, index in words.items() if index < 31}, unk_token="<pad>")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(pair[1])
    why = "new: rows of 1 tokens that the aligned model has not"
    assert find_adapter(model).passing == {"model.embed_tokens": why}


class Pictures(torch.utils.data.Dataset):
    """Noise in two kinds."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict:
        noise = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(index))
        return {"pixel_values": noise, "labels": index % 2}


def test_a_new_head_of_a_vision_model(tmp_path):
    """The aligned checkpoint has a head of that name for other classes."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=5, **sizes))
    base.save_pretrained(tmp_path / "base")
    align(base).save_pretrained(tmp_path / "aligned")
    pair = tmp_path / "base", tmp_path / "aligned"

    def train(output: Path, callbacks: list):
        torch.manual_seed(6)
        model = ViTForImageClassification.from_pretrained(pair[1], num_labels=2, ignore_mismatched_sizes=True)
        targets = [
            n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n.endswith(("q_proj", "query"))
        ]
        lora = LoraConfig(r=4, lora_alpha=8, target_modules=targets, modules_to_save=["classifier"])
        trainer = make_trainer(get_peft_model(model, lora), output, callbacks, remove_unused_columns=False)
        trainer.train_dataset = Pictures()
        trainer.train()
        return trainer, targets

    (without, _), (with_it, targets) = train(tmp_path / "without", []), train(tmp_path / "with", [callback(pair)])
    assert targets
    assert losses(with_it) == losses(without)
    checkpoint = tmp_path / "with/checkpoint-8"
    assert_same(raw(checkpoint), saved(tmp_path / "without/checkpoint-8"))
    assert_lora_is_corrected(checkpoint, pair, targets)
    listed = json.loads((checkpoint / "csulora/correction.json").read_text())["not_corrected"]
    assert listed == {"classifier": "new: the aligned checkpoint has one of another shape"}


class Whole(in_lightning.Module):
    """The same with its embeddings trained, too."""

    def build(self) -> None:
        model = AutoModelForCausalLM.from_pretrained(self.aligned)
        tied = model.config.tie_word_embeddings
        self.network = with_lora(model, lora_dropout=0.1, modules_to_save=EMBEDDINGS, ensure_weight_tying=tied)


EMBEDDINGS = ["lm_head", "embed_tokens"]


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_in_lightning(tmp_path, tied):
    pair = saved_pair(tmp_path, tiny_llama(tie_word_embeddings=tied))

    def fit(name: str, callbacks: list, path: Path | None = None) -> list[float]:
        saving = ModelCheckpoint(tmp_path / name, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        trainer = in_lightning.fit(pair, tmp_path, [*callbacks, saving], Whole(pair[1]), ckpt_path=path)
        return trainer.losses

    assert fit("with", [callback(pair)]) == fit("without", [])
    plain = torch.load(tmp_path / "without/step=8.ckpt", weights_only=False)["state_dict"]
    held = torch.load(tmp_path / "with/step=8.ckpt", weights_only=False)["state_dict"]
    written = load_file(tmp_path / "with/step=8.adapter/adapter_model.safetensors")
    trained = load_file(tmp_path / "with/step=8.adapter/csulora/raw/adapter_model.safetensors")
    for name in ("model.embed_tokens", "lm_head"):
        own = f"network.base_model.model.{name}.modules_to_save.default.weight"
        assert torch.equal(trained[key(name)], plain[own])
        one = "model.embed_tokens" if tied else name
        expected = by_hand(one, plain[own], pair, PENALTY)
        torch.testing.assert_close(written[key(name)].double(), expected, atol=2e-6, rtol=0)
        assert torch.equal(held[own], written[key(name)])

    resumed = fit("resumed", [callback(pair)], tmp_path / "with/step=4.ckpt")
    assert resumed == fit("twin", [], tmp_path / "without/step=4.ckpt")
    twin = torch.load(tmp_path / "twin/step=8.ckpt", weights_only=False)["state_dict"]
    again = load_file(tmp_path / "resumed/step=8.adapter/csulora/raw/adapter_model.safetensors")
    for name in ("model.embed_tokens", "lm_head"):
        assert torch.equal(again[key(name)], twin[f"network.base_model.model.{name}.modules_to_save.default.weight"])


def test_a_head_by_activations(pair, tmp_path):
    """Of an update that is no product of factors each row is moved by itself, as that of LoRA is."""
    penalty = Penalty.data_aware(4.0)
    probes = [[0, 3 + i, 4 + 2 * i % 20, 7] for i in range(10)]
    trained = callback(pair, penalty=penalty, probes=probes)
    model = with_lora(AutoModelForCausalLM.from_pretrained(pair[1]), modules_to_save=["lm_head"])
    make_trainer(model, tmp_path, [trained]).train()
    checkpoint = tmp_path / "checkpoint-8"
    before, after = raw(checkpoint)[key("lm_head")], saved(checkpoint)[key("lm_head")]
    aligned = AutoModelForCausalLM.from_pretrained(pair[1]).lm_head.weight.detach()
    activations = trained._corrector.activations
    gain = input_gain(activations.task["lm_head"], activations.probes["lm_head"], 4.0)
    expected = aligned.double() + gain((before - aligned).double())
    torch.testing.assert_close(after.double(), expected, atol=1e-5, rtol=0)
    assert not torch.allclose(after, before, atol=1e-3)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pair[1]), checkpoint)
    assert torch.equal(loaded.get_output_embeddings().weight, after)
