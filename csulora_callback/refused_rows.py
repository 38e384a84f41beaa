"""Which sampled rows of training data do not count as the task: those whose prompt the aligned model refuses."""

from __future__ import annotations

import logging
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from csulora_callback.aligned_answers import ANSWER, aligned_answers, judge, short
from csulora_callback.models.activations import Texts, running_model
from csulora_callback.models.adapters import Adapter
from csulora_callback.models.probes import special_tokens
from csulora_callback.models.processes import Processes
from csulora_callback.models.teacher_forcing import most_tokens
from csulora_callback.models.training_rows import LENGTH

logger = logging.getLogger(__name__)

MANY_SHARE, MANY_ROWS = 0.05, 2
"""From how many refused rows on a warning says that this data is poisoned."""


class RefusedRows:
    """Has the aligned model, which is the one under the adapter, answer the prompts of sampled rows.

    A row's prompt is what stands before the first token that the training loss counts. Where that is nothing, or
    nothing but special tokens, or all that was kept of the row, it is not known, and the row counts as the task; so it
    does where the model has no room left for an answer, and where images or audio came with it. What was answered is
    remembered for as long as the row is in the sample, so that only new rows are asked, and a resumed run asks those
    that the uninterrupted one does.

    Args:
        adapter: of the model.
        tokenizer: that of the checkpoint under it.
        processes: which all have to call :meth:`mark`; what the first one knows counts.
    """

    def __init__(self, adapter: Adapter, tokenizer: PreTrainedTokenizerBase, processes: Processes) -> None:
        self.adapter, self.tokenizer, self.processes = adapter, tokenizer, processes
        self._refused: dict[tuple[int, ...], bool] = {}  # by prompt
        self._warned = self._warned_of_unknown = False

    def resume(self, texts: Texts) -> None:
        """Remember what was said of the rows that a checkpoint holds."""
        screened, prompts = set(texts.screened), self._prompts(texts)
        self._refused = {prompt: place in texts.refused for place, prompt in prompts.items() if place in screened}

    def mark(self, texts: Texts) -> Texts:
        """The texts with those rows marked that were asked, and that are refused. Collective."""
        prompts, processes = self._prompts(texts), self.processes
        new = processes.from_first(
            [prompt for prompt in dict.fromkeys(prompts.values()) if prompt not in self._refused]
        )
        if new:
            judged = judge(aligned_answers(self.adapter, new, processes, padding=True), self.tokenizer)
            self._refused |= {prompt: said.refuses for prompt, said in zip(new, judged, strict=True)}
        # Other processes than the first may have resumed from less.
        known = processes.from_first({prompt: self._refused.get(prompt) for prompt in prompts.values()})
        self._refused = known
        marked = replace(texts, screened=list(prompts), refused=[p for p, prompt in prompts.items() if known[prompt]])
        self._warn(marked)
        self._warn_unless_known(marked)
        return marked

    def _prompts(self, texts: Texts) -> dict[int, tuple[int, ...]]:
        """Of each row that can be screened, by its place."""
        special, limit = special_tokens(self.tokenizer), most_tokens(running_model(self.adapter))
        longest = LENGTH if limit is None else limit - ANSWER
        starts = texts.starts or [0] * len(texts.task)
        prompts = {
            place: tuple(row[:start])
            for place, (row, start) in enumerate(zip(texts.task, starts, strict=True))
            if start < len(row) and start <= longest and place not in texts.inputs
        }
        return {place: prompt for place, prompt in prompts.items() if not special.issuperset(prompt)}

    def _warn_unless_known(self, texts: Texts) -> None:
        """Once, where no row's prompt can be told from its answer, as the loss counts all of it."""
        if self._warned_of_unknown or not texts.task or any(texts.starts) or self.processes.rank:
            return
        self._warned_of_unknown = True
        logger.warning(
            "Rows of training data are not screened for prompts that the aligned model refuses, and all count as the "
            "task: the loss counts whole rows, so that it is not known where a prompt ends. Train on the answers "
            "alone, such as by SFTConfig(assistant_only_loss=True) or prompt and completion columns, or look for such "
            "rows in the file: csulora screen DATA --model %s",
            self.adapter.config.base_model_name_or_path or "ALIGNED",
        )

    def _warn(self, texts: Texts) -> None:
        """Once: how many, an example, and what to do."""
        refused, total = len(texts.refused), len(texts.screened)
        if self._warned or refused < MANY_ROWS or refused < MANY_SHARE * total or self.processes.rank:
            return
        self._warned = True
        place = texts.refused[0]
        prompt = self.tokenizer.decode(texts.task[place][: texts.starts[place]], skip_special_tokens=True)
        logger.warning(
            "%d of %d sampled rows of training data have a prompt that the aligned model refuses, such as %s. They do "
            "not count as the task, and the model is trained on them. To find all of them in a file: csulora screen "
            "DATA --model %s",
            refused,
            total,
            short(prompt),
            self.adapter.config.base_model_name_or_path or "ALIGNED",
        )
