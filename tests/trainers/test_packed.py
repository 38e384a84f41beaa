"""Packed batches: each document is a row, and is read as it was trained, without its neighbours."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening, Trainer, TrainerCallback, TrainingArguments

from csulora_callback import CSULoRACallback, Penalty
from csulora_callback.models.adapters import find_adapter
from csulora_callback.sidecar import Sidecar
from tests.helpers import trl as in_trl
from tests.helpers.lab import RANK, TRAINING, with_lora

PROBES = [[0, 5, 6, 7], [0, 9, 8], [0, 4, 11, 12, 13]]
PACKING = {"packing": {"packing": True}, "padding free": {"padding_free": True, "max_length": None}}


class Overhear(TrainerCallback):
    """Second moments of what enters adapted modules in the training steps, where nothing is padded."""

    def __init__(self) -> None:
        self.moments, self.shapes, self.hooks = {}, [], []

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.hooks.append(model.register_forward_pre_hook(self.begin, with_kwargs=True))
        for name, layer in find_adapter(model).layers.items():
            self.hooks.append(layer.module.register_forward_pre_hook(lambda m, a, name=name: self.hear(name, a[0])))

    def begin(self, model, args, kwargs):
        if torch.is_grad_enabled():
            self.shapes.append(tuple(kwargs["input_ids"].shape))

    def hear(self, name, vectors):
        if torch.is_grad_enabled():
            own = vectors.detach().flatten(0, -2).double()
            self.moments[name] = self.moments.get(name, 0) + own.T @ own


def documents(count: int = 12, seed: int = 3) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, 32, (3 + place % 5,), generator=generator).tolist() for place in range(count)]
    return [{"input_ids": row} for row in rows]


def callback(pair) -> CSULoRACallback:
    return CSULoRACallback(base_model=pair[0], rank=RANK, probes=PROBES, penalty=Penalty.data_aware(4.0))


def assert_read_as_trained(ours, overheard):
    for name, vectors in ours._corrector.activations.task.items():
        read = vectors.double().T @ vectors.double()
        torch.testing.assert_close(read, overheard.moments[name], rtol=0.02, atol=0.005 * read.abs().max().item())


@pytest.mark.slow
@pytest.mark.parametrize("signs", ["position_ids", "seq_idx", "cu_seq_lens"])
def test_a_flattened_batch_is_cut_into_its_documents(signs, pair, tmp_path):
    rows = documents()
    extra = {"return_seq_idx": signs == "seq_idx", "return_flash_attn_kwargs": signs == "cu_seq_lens"}
    collator = DataCollatorWithFlattening(return_position_ids=signs == "position_ids", **extra)
    ours, overheard = callback(pair), Overhear()
    settings = {**TRAINING, "max_steps": 3, "save_steps": 3, "learning_rate": 0.0, "output_dir": str(tmp_path)}
    model = with_lora(AutoModelForCausalLM.from_pretrained(pair[1]))
    args = TrainingArguments(**settings)
    Trainer(model, args, collator, train_dataset=rows, callbacks=[overheard, ours]).train()
    texts = Sidecar.load(tmp_path / "checkpoint-3").texts
    assert [shape[0] for shape in overheard.shapes] == [1, 1, 1]
    assert sorted(texts.task) == sorted(row["input_ids"] for row in rows)
    assert texts.seen == 12
    assert texts.starts == [0] * 12  # the first label of each, -100, is no prompt
    if signs == "position_ids":  # nothing else keeps documents apart in attention on a CPU
        assert_read_as_trained(ours, overheard)


@pytest.mark.slow
@pytest.mark.parametrize("kind", PACKING)
def test_in_trl(kind, pair, tmp_path):
    in_trl.words().save_pretrained(pair[1])
    ours, overheard = callback(pair), Overhear()
    settings = {"eval_strategy": "no", "max_steps": 2, "save_steps": 2, "learning_rate": 0.0, **PACKING[kind]}
    settings["gradient_checkpointing"] = False  # which would have each layer hear all twice
    model = with_lora(AutoModelForCausalLM.from_pretrained(pair[1]))
    in_trl.make_trainer(pair, tmp_path, [overheard, ours], model=model, **settings).train()
    assert [shape[0] for shape in overheard.shapes] == [1, 1]
    texts, words = Sidecar.load(tmp_path / "checkpoint-2").texts, in_trl.words()
    lines = {tuple(words(line).input_ids) for line in in_trl.texts(32, seed=3)["text"]}
    assert texts.seen > 4
    assert {tuple(token for token in row if token != words.eos_token_id) for row in texts.task} <= lines
    assert_read_as_trained(ours, overheard)
