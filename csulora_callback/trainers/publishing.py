"""What a ``transformers.Trainer`` uploads: corrected adapters with their records, and with cards that say so.

What is replaced here stays on the Trainer after a run, because pushes come after training, and whether or not the
callback is still in its list: the folder that it uploads holds the raw adapter for as long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import HubStrategy

from csulora_callback import sidecar
from csulora_callback.pushing import leaving_out
from csulora_callback.trainers.patches import Patches, surrounded

if TYPE_CHECKING:
    from transformers import Trainer

_RESUMED = (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS)


def refuse_pushes(args: TrainingArguments, push_raw: bool) -> None:
    """Refuse to upload what training resumes from without the raw adapter, which is what it resumes from.

    Example:
        >>> args = TrainingArguments(push_to_hub=True, hub_strategy="every_save")
        >>> refuse_pushes(args, push_raw=False)
    """
    if args.push_to_hub and args.hub_strategy in _RESUMED and not push_raw:
        raise ValueError(
            f"`push_raw`: expected True with hub_strategy='{args.hub_strategy.value}', which uploads checkpoints "
            "whole, for training to resume from, and it resumes from the raw adapter, but got False. Set "
            "hub_strategy='every_save' to publish corrected adapters alone, or CSULoRACallback(push_raw=True) to "
            "publish the raw ones too."
        )


def follow_pushes(trainer: Trainer, push_raw: bool) -> None:
    """Leave the raw adapter, unless it is to be published, and texts out of what the Trainer uploads from now on.

    Rows of the training data are never uploaded.
    """
    files = [sidecar.TEXTS] if push_raw else [sidecar.TEXTS, f"{sidecar.RAW}/*"]
    patterns = [f"{above}{sidecar.FOLDER}/{file}" for above in ("", "*/") for file in files]

    def push(original: Callable, *args: object, **kwargs: object) -> object:
        with leaving_out(patterns):
            return original(*args, **kwargs)

    def write_card(original: Callable, *args: object, **kwargs: object) -> object:
        with _even_evaluations(trainer.state):
            result = original(*args, **kwargs)  # the Trainer's and TRL's begin a new one
        if trainer.is_world_process_zero():
            sidecar.renew_card(trainer.args.output_dir)
        return result

    patches = Patches()
    for name, call in (("push_to_hub", push), ("_push_from_checkpoint", push), ("create_model_card", write_card)):
        patches.replace(trainer, name, surrounded(call, lambda: True))


@contextmanager
def _even_evaluations(state: TrainerState) -> Iterator[None]:
    """Inside, all evaluations have the same keys in one order, as the Trainer's table of them takes for granted.

    One before the first step knows no rows of the task yet, and so none of the keys that are measured on them.
    """
    history = state.log_history
    keys = list(dict.fromkeys(key for record in history if "eval_loss" in record for key in record))
    state.log_history = [
        {key: record.get(key, "No log") for key in keys} if "eval_loss" in record else record for record in history
    ]  # "No log" is what the table says of a training loss that was not logged
    try:
        yield
    finally:
        state.log_history = history
