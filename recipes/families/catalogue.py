"""The classes of models that the installed transformers has for what people fine-tune, and the adapters to try."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from peft import TaskType
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from transformers.models.auto import modeling_auto

ALL_LINEAR, PEFT_DEFAULT = "all-linear", "peft-default"
ADAPTERS = (ALL_LINEAR, PEFT_DEFAULT)


@dataclass(frozen=True)
class Task:
    """A mapping of transformers from families to classes, and what PEFT calls such a model.

    Attributes:
        mapping: the middle of the mapping's name.
        peft: ``None`` where PEFT has no word for it.
        new_head: whether the head is not in the checkpoints, as where a language model becomes a classifier.
        last: whether it is tried only for families that have no class of another task.
    """

    mapping: str
    peft: TaskType | None
    new_head: bool = False
    last: bool = False

    def classes(self) -> dict[str, str]:
        """The class's name by family."""
        names = getattr(modeling_auto, f"MODEL_FOR_{self.mapping}_MAPPING_NAMES")
        return {family: name if isinstance(name, str) else name[0] for family, name in names.items()}


TASKS = {
    "causal": Task("CAUSAL_LM", TaskType.CAUSAL_LM),
    "seq2seq": Task("SEQ_TO_SEQ_CAUSAL_LM", TaskType.SEQ_2_SEQ_LM),
    "image and text": Task("IMAGE_TEXT_TO_TEXT", TaskType.CAUSAL_LM),
    "speech": Task("SPEECH_SEQ_2_SEQ", None),
    "image classes": Task("IMAGE_CLASSIFICATION", None),
    "text classes": Task("SEQUENCE_CLASSIFICATION", TaskType.SEQ_CLS, new_head=True),
    "token classes": Task("TOKEN_CLASSIFICATION", TaskType.TOKEN_CLS, new_head=True, last=True),
}


@dataclass(frozen=True)
class Entry:
    """What is tried: one class of one family with one adapter."""

    family: str
    task: str
    kind: str
    adapter: str

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells it from the others, see :class:`recipes.files.points.Points`."""
        return self.family, self.task, self.adapter


KEY = ("family", "task", "adapter")


def catalogue(families: Collection[str] = (), adapters: Collection[str] = ADAPTERS) -> list[Entry]:
    """Everything there is to try, each class once; of these families alone, if any are named.

    PEFT's own choice of modules is tried where it has one, which then differs from all linear ones.

    Raises:
        ValueError: for a family that transformers has no such class of, or an adapter that is none of ``ADAPTERS``.

    Example:
        >>> [(entry.kind, entry.adapter) for entry in catalogue(["qwen2"]) if entry.task == "causal"]
        [('Qwen2ForCausalLM', 'all-linear'), ('Qwen2ForCausalLM', 'peft-default')]
    """
    everything, seen = [], set()  # a class may serve two tasks
    for task, about in TASKS.items():
        for family, kind in about.classes().items():
            if (family, kind) in seen or (about.last and family in dict(seen)):
                continue
            seen.add((family, kind))
            everything += [
                Entry(family, task, kind, adapter)
                for adapter in ADAPTERS
                if adapter == ALL_LINEAR or family in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
            ]
    _check("adapter", adapters, ADAPTERS)
    _check("family", families, sorted({entry.family for entry in everything}))
    return [e for e in everything if e.adapter in adapters and (not families or e.family in families)]


def _check(option: str, given: Collection[str], known: Collection[str]) -> None:
    for name in given:
        if name not in known:
            near = [other for other in known if name.lower().split("_")[0] in other] or list(known)
            raise ValueError(f"`--{option}`: expected one of {', '.join(near[:8])}, …, but got {name!r}.")
