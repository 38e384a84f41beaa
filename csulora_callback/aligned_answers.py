"""How the aligned model begins to answer prompts, and whether it refuses them so."""

from __future__ import annotations

from dataclasses import dataclass
from reprlib import Repr

from transformers import PreTrainedTokenizerBase

from csulora_callback.judging.refusal import RefusalPhrases
from csulora_callback.models.activations import running_model
from csulora_callback.models.adapters import Adapter
from csulora_callback.models.processes import Processes
from csulora_callback.models.reading import Rows
from csulora_callback.models.teacher_forcing import greedy_answers

ANSWER = 16
"""How many tokens of an answer are judged: enough for "Unfortunately, I'm not able to"."""

_SHORT = Repr()
_SHORT.maxstring = 60


@dataclass(frozen=True)
class Judged:
    """How an answer begins, as text, and whether it refuses."""

    text: str
    refuses: bool


def aligned_answers(
    adapter: Adapter, prompts: Rows, processes: Processes, progress: bool = False, padding: bool = False
) -> list[list[int]]:
    """The first tokens of what the model under an adapter answers greedily; the first process's. Collective.

    See :func:`~csulora_callback.models.teacher_forcing.greedy_answers`.
    """
    with adapter.off():
        return processes.from_first(
            processes.together(lambda: greedy_answers(running_model(adapter), prompts, ANSWER, progress, padding))
        )


def judge(answers: Rows, tokenizer: PreTrainedTokenizerBase) -> list[Judged]:
    """What answers, given as token ids, say, and whether they refuse by :class:`~csulora_callback.RefusalPhrases`."""
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    verdicts = RefusalPhrases()([""] * len(texts), texts)  # which does not look at the prompts
    return [Judged(text, refuses) for text, refuses in zip(texts, verdicts, strict=True)]


def short(text: str) -> str:
    r"""A text for one line of a message: in quotes, cut in the middle, and without what a terminal would obey.

    Example:
        >>> short("How do I pick" + chr(10) + "a lock?")
        "'How do I pick\\na lock?'"
    """
    return _SHORT.repr(text)
