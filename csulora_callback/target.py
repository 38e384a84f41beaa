"""How readily a model is still to refuse, in the place of a strength, which is looked for again and again.

What is to be kept is a share of the *likelihood* of the aligned model's refusals, and not of the refusals that begin
word for word alike: on a model that has several ways to refuse, the correction may bring refusing back in other words,
and no strength then keeps nine of ten; and the likelihood is smooth, where a count of some dozens is not.
"""

from __future__ import annotations

import logging
import math

from csulora_callback.behaviour import Refusals
from csulora_callback.checked_probes import FEWEST
from csulora_callback.corrector import SafetyCorrector
from csulora_callback.method.search import Found, smallest_strength
from csulora_callback.models.training_rows import fixed_sample
from csulora_callback.presets import Family
from csulora_callback.swap import LOCK

logger = logging.getLogger(__name__)


def fewest_probes(reads: bool) -> int:
    """How many probes have to be refused for a target, by whether the correction reads some of them itself.

    Example:
        >>> fewest_probes(reads=True)
        16
    """
    return 2 * FEWEST if reads else FEWEST


def held_back(count: int, reads: bool) -> list[int]:
    """Of so many probes, the places of those that a correction for a target does not read, to be measured by.

    What a correction reads says too much of what it keeps. So where it reads, a fixed half is held back, drawn at
    random as files are often sorted by topic. Where it reads nothing, none is, and all are measured by.

    Raises:
        ValueError: if there are too few to measure by.

    Example:
        >>> len(held_back(40, reads=True)), held_back(40, reads=False)
        (20, [])
    """
    fewest = fewest_probes(reads)
    if count < fewest:
        why = "target, as a data-aware correction reads one half and the other is measured by" if reads else "target"
        raise ValueError(
            f"`probes`: expected at least {fewest} that the aligned model refuses for a {why}, but got {count}. Pass "
            "more, or probes='builtin', or a penalty that has its strength, such as Penalty.guard(10)."
        )
    return fixed_sample(count, count // 2) if reads else []


class Target:
    """Gives a corrector the smallest strength of a preset for which the corrected model refuses readily enough.

    Args:
        share: of the aligned model's likelihood per token of its refusals, ``exp(csulora/refusal_logprob)``, in
            (0, 1].
        family: the preset.
        refusals: what is measured by; prompts that the correction itself does not read.

    Example:
        >>> from csulora_callback import Penalty
        >>> Target(0.9, Penalty.guard, refusals=None).family(3.0)
        Penalty(name='guard', parameters={'strength': 3.0})
    """

    def __init__(self, share: float, family: Family, refusals: Refusals) -> None:
        self.share, self.family, self.refusals = share, family, refusals
        self._warned = False

    def choose(self, corrector: SafetyCorrector) -> None:
        """Look for the strength for the model as it stands, at most eight passes over the prompts.

        Collective where there are several processes, which all find the same: the first one's passes count.
        """
        before = corrector.penalty, corrector.chosen
        with LOCK:  # who saves from another thread gets no trial
            try:
                found = self._search(corrector)
            except BaseException:  # as when somebody interrupts it
                corrector.penalize(*before)
                raise
            if found is None:
                return
            penalty, prompts = self.family(found.strength), len(self.refusals)
            corrector.penalize(penalty, {"share": self.share, "likelihood": found.kept, "prompts": prompts})
        if not found.is_enough and not self._warned and self.refusals.processes.rank == 0:
            self._warned = True
            logger.warning(
                "`target`: expected a correction that keeps %.0f %% of the refusals' likelihood, but %s, the "
                "strongest that is tried, keeps %.0f %%. It is what is saved, and may cost much of the task "
                "(csulora/task_loss_corrected). Take a lower target, or a penalty that may keep more, such as "
                "Penalty.guard; rows that the aligned model refuses, if the data has some: csulora screen.",
                100 * self.share,
                penalty,
                100 * found.kept,
            )

    def _search(self, corrector: SafetyCorrector) -> Found | None:
        """Nothing is found for a model that does not compute: what is saved of it is not corrected anyway."""
        raw = self.refusals.read().likelihood
        if math.isnan(raw):
            return None

        def kept(strength: float) -> float:
            if not strength:
                return raw
            with corrector.trying(self.family(strength)) as adapter:
                # Where it could not be made, the raw factors are live.
                return self.refusals.read().likelihood if adapter.metrics else math.nan

        return smallest_strength(kept, self.share)
