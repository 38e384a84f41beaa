"""One class of models, from a tiny config to a checked checkpoint: built, adapted, trained and saved."""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import Trainer, TrainingArguments

import csulora_callback
from csulora_callback import CSULoRACallback, Penalty
from recipes.families.batches import ROWS, make_batch
from recipes.families.catalogue import ALL_LINEAR, TASKS, Entry
from recipes.families.pair import RANK, Pair, make_pair
from recipes.families.reference import STRENGTH, check

CORRECTED, LOST, WRONG, REFUSED, FAILED, NOT_ADAPTED, NOT_BUILT = OUTCOMES = (
    "corrected", "not loaded", "wrong", "refused", "failed", "not adapted", "not built"
)  # fmt: skip
TOLERANCE = 1e-4  # of what is float32 on the way, and can be ill-conditioned in matrices as small as these
STEPS = 2
_LIBRARY = str(Path(csulora_callback.__file__).parent)


def attempt(entry: Entry, report: Callable[[str], None]) -> dict:
    """What came out for one entry, as JSON values; ``report`` is told each stage before it begins."""
    with tempfile.TemporaryDirectory(prefix="families-") as scratch:
        found = _attempt(entry, Path(scratch), report)
        return found | {"said": found["said"].replace(f"{scratch}/", "")}


def _attempt(entry: Entry, folder: Path, report: Callable[[str], None]) -> dict:
    found = {**asdict(entry), "said": ""}
    report(NOT_BUILT)
    try:
        pair = make_pair(entry, folder)
        model, _ = pair.load(pair.aligned)
    except Exception as error:  # transformers fails in as many ways as it has families
        return found | {"outcome": NOT_BUILT, "said": sentence(error)}
    report(NOT_ADAPTED)
    try:
        torch.manual_seed(2)
        model = get_peft_model(model, lora(entry))
    except Exception as error:  # PEFT's, where it finds nothing to adapt
        return found | {"outcome": NOT_ADAPTED, "said": sentence(error)}
    report(FAILED)
    batch, why = usable_batch(entry, model)
    found["trained_on"] = "the factors alone" if batch is None else " and ".join(sorted({*batch} - {"labels"}))
    try:
        train(model, batch, pair, folder)
    except ValueError as error:
        if not is_refusal(error):
            raise
        return found | {"outcome": REFUSED, "said": sentence(error)}
    checked = check(pair, folder / f"out/checkpoint-{STEPS}/csulora/raw", folder / f"out/checkpoint-{STEPS}")
    outcome = WRONG if checked.worst >= TOLERANCE else LOST if checked.lost else CORRECTED
    return found | {**asdict(checked), "outcome": outcome, "said": why}


def lora(entry: Entry) -> LoraConfig:
    """An adapter whose update is not zero when it begins."""
    targets = "all-linear" if entry.adapter == ALL_LINEAR else None
    return LoraConfig(
        r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False, task_type=TASKS[entry.task].peft
    )


def usable_batch(entry: Entry, model: PeftModel) -> tuple[dict[str, Tensor] | None, str]:
    """A batch that the model takes and has a loss for, or ``None`` and why there is none."""
    try:
        batch = make_batch(entry.task, model.get_base_model())
        model.train()
        model(**batch).loss.backward()
    except Exception as error:  # each class has its own demands on what it is given
        return None, f"no batch: {sentence(error)}"
    finally:
        model.zero_grad()
    return batch, ""


class AnyTrainer(Trainer):
    """Where a model takes no batch of ours, the loss is the size of the factors: they are trained all the same."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if "labels" in inputs:
            return super().compute_loss(model, inputs, return_outputs)
        loss = sum(parameter.square().sum() for parameter in model.parameters() if parameter.requires_grad)
        return (loss, {}) if return_outputs else loss


def train(model: PeftModel, batch: dict[str, Tensor] | None, pair: Pair, folder: Path) -> None:
    """A few steps of the real Trainer with the callback, and a checkpoint at their end."""
    rows = [{"nothing": torch.zeros(1)}] * ROWS
    if batch is not None:
        rows = [{key: value[row] for key, value in batch.items()} for row in range(ROWS)]
    arguments = TrainingArguments(
        str(folder / "out"),
        max_steps=STEPS,
        save_steps=STEPS,
        per_device_train_batch_size=ROWS,
        learning_rate=1e-2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    callback = CSULoRACallback(
        base_model=pair.base, rank=RANK, penalty=Penalty.guard(STRENGTH), cache_dir=folder / "cache"
    )
    AnyTrainer(model=model, args=arguments, train_dataset=rows, callbacks=[callback]).train()


def is_refusal(error: Exception) -> bool:
    """Whether the library raised it itself, and not something that it called or was called by."""
    return traceback.extract_tb(error.__traceback__)[-1].filename.startswith(_LIBRARY)


def sentence(error: Exception) -> str:
    """Its first sentence, in one line, after its kind where it is none of values.

    Example:
        >>> sentence(ValueError("module 'a.b': not supported. Leave it out.")), sentence(KeyError("x"))
        ("module 'a.b': not supported.", "KeyError: 'x'")
    """
    first = " ".join(str(error).split()).split(". ")
    text = first[0] + ("." if len(first) > 1 else "")
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}".rstrip(": ")
