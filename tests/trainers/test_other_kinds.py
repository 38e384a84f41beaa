"""Models that cannot be asked what they are to refuse: with probes they are refused before training, by name."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from csulora_callback import CSULoRACallback, Penalty
from tests.helpers.lab import TRAINING, align, saved, tiny_llama

PROBES = [[0, 5, 6, 7], [0, 9, 8]]
ENCODER, HEADLESS = "has an encoder", "has no head that continues texts"


def t5():
    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))


def bart():
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in SIZES.items()}
    return BartForConditionalGeneration(BartConfig(vocab_size=32, d_model=16, max_position_embeddings=32, **sides))


def whisper():
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in SIZES.items()}
    limits = {"num_mel_bins": 4, "max_source_positions": 6, "max_target_positions": 16, "vocab_size": 32}
    tokens = {"pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    return WhisperForConditionalGeneration(WhisperConfig(d_model=16, **limits, **sides, **tokens))


def vit():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4))


def bert():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertForMaskedLM(BertConfig(vocab_size=32, **sizes))


def classifier():
    return LlamaForSequenceClassification(tiny_llama(num_labels=2).config)


SIZES = {"layers": 1, "ffn_dim": 16, "attention_heads": 2}
IDS = {"input_ids": torch.randint(3, 32, (5,), generator=torch.Generator().manual_seed(0))}
PIXELS = {"pixel_values": torch.ones(3, 8, 8), "labels": torch.tensor(1)}
LISTENED = {"input_features": torch.ones(4, 12), "labels": IDS["input_ids"]}
KINDS = {
    "t5": (t5, ["q"], {**IDS, "labels": IDS["input_ids"]}, ENCODER),
    "bart": (bart, ["q_proj"], {**IDS, "labels": IDS["input_ids"]}, ENCODER),
    "whisper": (whisper, ["q_proj"], LISTENED, ENCODER),
    "vit": (vit, r".*(query|q_proj)", PIXELS, HEADLESS),
    "bert": (bert, ["query"], {**IDS, "labels": IDS["input_ids"]}, HEADLESS),
    "classifier": (classifier, ["q_proj"], {**IDS, "labels": torch.tensor(1)}, HEADLESS),
}


def make_trainer(kind, output, **arguments):
    build, targets, row, _ = KINDS[kind]
    torch.manual_seed(0)
    base = build()
    model = get_peft_model(align(base), LoraConfig(r=2, target_modules=targets))
    settings = {**TRAINING, "max_steps": 2, "save_steps": 2, "output_dir": str(output)}
    ours = CSULoRACallback(base_model=base, rank=2, **arguments)
    return Trainer(model, TrainingArguments(**settings), train_dataset=[row] * 8, callbacks=[ours])


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == "vit" else pytest.mark.slow) for kind in KINDS]
)
@pytest.mark.parametrize("penalty", [Penalty.data_aware(4.0), Penalty.guard(4.0)], ids=["data aware", "guard"])
def test_probes_are_refused_before_training(kind, penalty, tmp_path):
    trainer = make_trainer(kind, tmp_path, penalty=penalty, probes=PROBES)
    with pytest.raises(ValueError, match=r"^`probes`: expected a decoder-only language model") as refused:
        trainer.train()
    assert KINDS[kind][3] in str(refused.value)
    assert "penalty=Penalty.guard(10) without probes" in str(refused.value)
    assert trainer.state.global_step == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_what_the_refusal_names_does_help(kind, tmp_path):
    make_trainer(kind, tmp_path, penalty=Penalty.guard(10.0)).train()
    assert saved(tmp_path / "checkpoint-2")
