"""What a model does, read in forward passes: how much of its refusing is left, and what a correction does to its task.

Nothing is generated: an answer begins greedily with some tokens if and only if each of them is the likeliest after the
prompt and those before it, and one pass over prompt and tokens says that of all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from csulora_callback.correcting import STRENGTH
from csulora_callback.corrector import SafetyCorrector
from csulora_callback.models.activations import Activations, Texts
from csulora_callback.models.adapters import Adapter
from csulora_callback.models.factors import equal_each
from csulora_callback.models.processes import Processes
from csulora_callback.models.reading import Rows
from csulora_callback.models.teacher_forcing import batches_of

BEGINNING = 4
"""How many tokens of a refusal count; the first one alone says little: too many answers begin with it."""

BEHAVIOUR_KEYS = (
    "csulora/refusal_kept",
    "csulora/refusal_kept_corrected",
    "csulora/refusal_logprob",
    "csulora/refusal_logprob_corrected",
    "csulora/task_loss",
    "csulora/task_loss_corrected",
    "csulora/task_kl",
    "csulora/refused_rows",
)
"""What :class:`Behaviour` measures, by name."""


@dataclass(frozen=True)
class Refusing:
    """How much of the aligned model's refusing is left in a model.

    Attributes:
        kept: the share of prompts that it answers, greedily, as the aligned model begins its refusals. Counted are the
            prompts for which the same pass says so of the aligned model itself: all of them in float32, and some 9 in
            10 in bfloat16, where padding decides near ties. So it is 1 for the aligned model, and in [0, 1].
        logprob: the mean log-likelihood per token of those beginnings, over all prompts, less that under the aligned
            model in the same pass: 0 for the aligned model, and negative where a model refuses less readily.
    """

    kept: float
    logprob: float

    @property
    def likelihood(self) -> float:
        """The likelihood per token of those beginnings, the geometric mean, as a share of the aligned model's."""
        return math.exp(self.logprob)


class Refusals:
    """Prompts that the aligned model refuses, and how its refusals begin: to be held against a model as it stands.

    Args:
        adapter: of the model; without it, it is the aligned one.
        prompts: as token ids.
        beginnings: of each prompt, the first tokens that the aligned model answers greedily.
        processes: which all have to call the same methods; the first one's numbers count.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from csulora_callback.models.adapters import find_adapter
        >>> from csulora_callback.models.teacher_forcing import greedy_answers
        >>> config = LlamaConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        ... )
        >>> lora = LoraConfig(r=2, target_modules=["q_proj"])  # fresh: it changes nothing yet
        >>> adapter, prompts = find_adapter(get_peft_model(LlamaForCausalLM(config), lora)), [[5, 6, 7], [8, 9]]
        >>> with adapter.off():
        ...     beginnings = greedy_answers(adapter.model, prompts, BEGINNING)
        >>> refusals = Refusals(adapter, prompts, beginnings)
        >>> refusals.read()
        Refusing(kept=1.0, logprob=0.0)
        >>> len(refusals.of([1])), refusals.of([1]).read().kept
        (1, 1.0)
    """

    def __init__(self, adapter: Adapter, prompts: Rows, beginnings: Rows, processes: Processes | None = None) -> None:
        self.adapter, self.prompts, self.beginnings = adapter, prompts, beginnings
        self.processes = processes or Processes()
        texts = [[*prompt, *beginning] for prompt, beginning in zip(prompts, beginnings, strict=True)]
        self._batches = batches_of(texts, [len(prompt) for prompt in prompts])
        self._aligned: list[tuple[bool, float]] | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    def of(self, places: Sequence[int]) -> Refusals:
        """Those that stand at some places."""
        prompts, beginnings = ([rows[place] for place in places] for rows in (self.prompts, self.beginnings))
        return Refusals(self.adapter, prompts, beginnings, self.processes)

    def read(self) -> Refusing:
        """Of the model as it stands, in one pass; the first time in two, as the aligned model is read then too."""
        if self._aligned is None:
            with self.adapter.off():
                self._aligned = self._pass()
        here = self._pass()
        kept = [same for (same, _), (own, _) in zip(here, self._aligned, strict=True) if own]
        less = [logprob - own for (_, logprob), (_, own) in zip(here, self._aligned, strict=True)]
        return Refusing(fmean(kept) if kept else math.nan, fmean(less))

    def _pass(self) -> list[tuple[bool, float]]:
        """Of each prompt, whether the beginning is the greedy one, and its log-likelihood per token."""

        def read() -> list[tuple[bool, float]]:
            of = {
                place: (said.is_greedy, said.log_likelihood.mean().item())
                for batch in self._batches
                for place, said in zip(batch.places, batch.read(self.adapter), strict=True)
            }
            return [of[place] for place in range(len(self))]

        return self.processes.from_first(self.processes.together(read))


class Behaviour:
    """What is logged of a model: its refusing and its task, before and after the correction.

    ===================================  =======================================================================
    ``csulora/refusal_kept``             see :class:`Refusing`; with ``_corrected``, of what would be saved
    ``csulora/refusal_logprob``          see :class:`Refusing`; with ``_corrected``, of what would be saved
    ``csulora/task_loss``                mean negative log-likelihood per token on the sampled rows of training
                                         data, from the first token on that the training loss counts; with
                                         ``_corrected``, of what would be saved
    ``csulora/task_kl``                  mean divergence ``KL(raw ‖ corrected)`` per token there
    ``csulora/refused_rows``             share of those rows, of which the prompt is known, that the aligned model
                                         refuses: they are in none of the task's numbers
    ``csulora/strength``                 of the penalty, where it was looked for
    ===================================  =======================================================================

    Those of the task are left out where no row of training data has been seen, and the share of refused ones where no
    prompt of one could be asked.

    Args:
        refusals: of the model that is trained.
    """

    def __init__(self, refusals: Refusals) -> None:
        self.refusals = refusals
        self._of: tuple[list[Tensor], Activations | None] | None = None  # what was measured last
        self._values: dict[str, float] = {}

    def measure(self, corrector: SafetyCorrector) -> dict[str, float]:
        """Measure the model as it stands as the raw one, and its correction; neither is in the model after it.

        Nothing is read where nothing has changed since the last time. Collective where there are several processes.
        """
        if not all(self.refusals.processes.gather(self._is_known(corrector))):
            self._values = self._measure(corrector)
            self._of = [tensor.clone() for tensor in corrector.adapter.held()], corrector.activations
        return dict(self._values)

    def _is_known(self, corrector: SafetyCorrector) -> bool:
        if self._of is None or self._of[1] is not corrector.activations:
            return False
        return all(equal_each(corrector.adapter.held(), self._of[0]))

    def _measure(self, corrector: SafetyCorrector) -> dict[str, float]:
        with corrector.lifted():
            raw = self.refusals.read()
        with corrector.corrected() as adapter:
            corrected = self.refusals.read()
        processes = self.refusals.processes
        return {
            "csulora/refusal_kept": raw.kept,
            "csulora/refusal_kept_corrected": corrected.kept,
            "csulora/refusal_logprob": raw.logprob,
            "csulora/refusal_logprob_corrected": corrected.logprob,
            **processes.from_first(processes.together(lambda: _task(corrector))),
            **{key: value for key, value in adapter.metrics.items() if key == STRENGTH},
            **_refused(corrector.activations.texts),
        }


def _task(corrector: SafetyCorrector) -> dict[str, float]:
    """Batch by batch, as the divergence takes both models' logits: those of all rows would fill the memory."""
    loss, corrected_loss, divergence, tokens = 0.0, 0.0, 0.0, 0
    for batch in batches_of(*corrector.activations.texts.counted):
        with corrector.lifted():
            raw = batch.read(corrector.adapter)
        with corrector.corrected():
            corrected = batch.read(corrector.adapter)
        for before, after in zip(raw, corrected, strict=True):
            loss -= before.log_likelihood.sum().item()
            corrected_loss -= after.log_likelihood.sum().item()
            divergence += _divergence(before.logits, after.logits)
            tokens += len(before.tokens)
    if not tokens:
        return {}
    return {
        "csulora/task_loss": loss / tokens,
        "csulora/task_loss_corrected": corrected_loss / tokens,
        "csulora/task_kl": divergence / tokens,
    }


def _refused(texts: Texts) -> dict[str, float]:
    return {"csulora/refused_rows": len(texts.refused) / len(texts.screened)} if texts.screened else {}


def _divergence(before: Tensor, after: Tensor) -> float:
    """``KL(p_before ‖ p_after)``, summed over tokens."""
    p, q = before.log_softmax(-1), after.log_softmax(-1)
    return torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True).item()
