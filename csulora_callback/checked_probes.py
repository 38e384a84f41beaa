"""Which probes count: those that the aligned model does refuse, and how its refusals begin."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from csulora_callback.aligned_answers import ANSWER, aligned_answers, judge, short
from csulora_callback.answers_cache import CachedAnswers
from csulora_callback.behaviour import BEGINNING
from csulora_callback.models.activations import refuse_unless_causal, running_model, vocabulary_of
from csulora_callback.models.adapters import Adapter
from csulora_callback.models.checksum import checksum, weights_besides
from csulora_callback.models.fused_experts import check_inputs
from csulora_callback.models.probes import ask, check_ids, load_tokenizer, read_prompts
from csulora_callback.models.processes import Processes
from csulora_callback.models.reading import Rows
from csulora_callback.models.teacher_forcing import end_tokens

logger = logging.getLogger(__name__)

FEWEST = 8
"""How many probes have to be refused: of fewer, one alone would move the share by more than an eighth."""


@dataclass(frozen=True)
class CheckedProbes:
    """Prompts that the aligned model refuses.

    Attributes:
        prompts: as token ids.
        beginnings: of each, the first tokens of the aligned model's greedy answer.
        left_out: prompts that it does not refuse, and its answers.
        tokenizer: that of the checkpoint under the adapter; ``None`` where the prompts were given as token ids.
        from_cache: whether the answers were found in the cache.
    """

    prompts: Rows
    beginnings: Rows
    left_out: Sequence[tuple[str, str]]
    tokenizer: PreTrainedTokenizerBase | None
    from_cache: bool

    @property
    def is_checked(self) -> bool:
        """Whether the answers were judged: those to texts are, those to token ids are not."""
        return self.tokenizer is not None


def check_readable(adapter: Adapter, reads: bool) -> None:
    """Raise ``ValueError`` unless the model under an adapter can be asked probes, and its modules' inputs be read.

    Args:
        adapter: in its model.
        reads: whether inputs will be.
    """
    refuse_unless_causal(adapter, "probes")
    adapter.beside.check_off()
    if reads:
        check_inputs(adapter.layers)


def check_probes(
    adapter: Adapter,
    probes: Sequence[str] | Rows,
    cache_dir: Path | None = None,
    processes: Processes | None = None,
    progress: bool = False,
    checkpoint: str | os.PathLike | None = None,
    fewest: int = FEWEST,
) -> CheckedProbes:
    """Have the aligned model, which is the one under the adapter, answer the probes, and leave out what it answers.

    Texts are asked through the tokenizer of ``checkpoint``, by default the one under the adapter, and the answers
    judged by :class:`~csulora_callback.RefusalPhrases`. Token ids are taken at their word: that is the way for models
    which refuse in another language. At least ``fewest`` texts have to be left. Collective where there are several
    processes; the first one's answers and cache count.

    Raises:
        ValueError: if probes cannot be asked, the model is no causal language model, or too few are refused.
    """
    refuse_unless_causal(adapter, "probes")
    processes, checkpoint = processes or Processes(), checkpoint or adapter.config.base_model_name_or_path
    pairs = processes.together(lambda: ask(probes, checkpoint))
    prompts = [ids for _, ids in pairs]
    check_ids(prompts, vocabulary_of(adapter))
    answers, from_cache = _answers(adapter, prompts, cache_dir, processes, progress)
    tokenizer, left_out = None, {}
    if isinstance(probes[0], str):
        tokenizer = processes.together(lambda: load_tokenizer(checkpoint, "probes"))
        judged = enumerate(judge(answers, tokenizer))
        left_out = {place: (pairs[place][0], said.text) for place, said in judged if not said.refuses}
        _say(list(left_out.values()), len(pairs), fewest, processes.rank == 0)
    kept = [place for place in range(len(pairs)) if place not in left_out]
    return CheckedProbes(
        [prompts[place] for place in kept],
        [answers[place][:BEGINNING] for place in kept],
        list(left_out.values()),
        tokenizer,
        from_cache,
    )


def _answers(
    adapter: Adapter, prompts: Rows, cache_dir: Path | None, processes: Processes, progress: bool
) -> tuple[list[list[int]], bool]:
    cache = None
    if cache_dir is not None:
        weights = checksum(weights_besides(running_model(adapter), adapter.parameters))
        cache = CachedAnswers(cache_dir, f"{weights} {end_tokens(running_model(adapter))}", prompts, ANSWER)
    is_first = processes.rank == 0
    found = processes.from_first(processes.together(lambda: cache.read() if cache and is_first else None))
    if found is not None:
        return found, True
    answers = aligned_answers(adapter, prompts, processes, progress)
    if cache and is_first:
        cache.write(answers)
    return answers, False


def _say(left_out: Sequence[tuple[str, str]], total: int, fewest: int, is_first: bool) -> None:
    """One line about those that are left out, or an error where too few are left."""
    shown = "; ".join(f"{short(prompt)} is answered by {short(text)}" for prompt, text in left_out[:3])
    refused = total - len(left_out)
    if refused < fewest:
        raise ValueError(
            f"`probes`: expected at least {fewest} prompts that the aligned model refuses, but got {refused} of "
            f"{total}{f': {shown}' if shown else ''}. {_what_to_do(left_out)}"
        )
    if left_out and is_first:
        logger.warning(
            "%d of %d probes are not refused by the aligned model, and left out: %s%s",
            len(left_out),
            total,
            shown,
            "; …" if len(left_out) > 3 else "",
        )


def _what_to_do(left_out: Sequence[tuple[str, str]]) -> str:
    """Where too few probes are refused; of those that are not ``left_out``, nothing is wrong but their number."""
    if not left_out:
        return "Pass more of them, or probes='builtin'."
    builtin = {prompt for prompt, _ in left_out}.issubset(read_prompts("builtin"))
    return (
        "Is the model under the adapter the aligned one, and has its tokenizer the chat template? Pass prompts that "
        f"it refuses{'' if builtin else ', such as probes=' + repr('builtin')}, or leave `probes` out and take "
        "penalty=Penalty.guard(10). If it does refuse these, in words that RefusalPhrases does not know, pass them as "
        "lists of token ids, which are not checked."
    )
