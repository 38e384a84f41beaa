"""What the callback should say of a model: a fresh one gets the adapters of a checkpoint, and is read."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from csulora_callback.behaviour import BEGINNING, Refusals
from csulora_callback.models.activations import Texts
from csulora_callback.models.adapters import find_adapter
from csulora_callback.models.factors import from_peft_state_dict
from csulora_callback.models.teacher_forcing import greedy_answers
from tests.helpers.lab import DEVICE, with_lora

PROBES = [[0, 3 + i, 4 + 2 * i % 20, *range(5, 5 + i % 3)] for i in range(10)]
REFUSAL = {f"csulora/refusal_{kind}{which}" for kind in ("kept", "logprob") for which in ("", "_corrected")}
TASK = {"csulora/task_loss", "csulora/task_loss_corrected", "csulora/task_kl"}


def by_hand(aligned: Path, raw: dict, corrected: dict, texts: Texts) -> dict[str, float]:
    """What is to be said of a raw and a corrected adapter, as PEFT's files hold them."""
    model = with_lora(AutoModelForCausalLM.from_pretrained(aligned)).to(DEVICE).eval()
    adapter = find_adapter(model)
    with adapter.off():
        refusals = Refusals(adapter, texts.probes, greedy_answers(model, texts.probes, BEGINNING))
    values, said = {}, {}
    for which, factors in (("", raw), ("_corrected", corrected)):
        adapter.write(from_peft_state_dict(factors, list(adapter.layers), which))
        read = refusals.read()
        values[f"csulora/refusal_kept{which}"], values[f"csulora/refusal_logprob{which}"] = read.kept, read.logprob
        rows = list(zip(texts.task, [max(start, 1) for start in texts.starts or [0] * len(texts.task)], strict=True))
        with torch.no_grad():
            read = [model(input_ids=torch.tensor([row], device=DEVICE)).logits[0].cpu() for row, _ in rows]
        kept = [logits[start - 1 : -1] for logits, (_, start) in zip(read, rows, strict=True)]
        said[which] = torch.cat(kept).double().log_softmax(-1)
        tokens = torch.tensor([token for row, start in rows for token in row[start:]])
        values[f"csulora/task_loss{which}"] = -said[which].gather(1, tokens[:, None]).mean().item()
    p, q = said[""], said["_corrected"]
    return {**values, "csulora/task_kl": (p.exp() * (p - q)).sum(-1).mean().item()}
