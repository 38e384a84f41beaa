"""A share of the refusals that is to be kept, in the place of a strength, which is looked for again and again."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from csulora_callback.behaviour import Refusals
from csulora_callback.checked_probes import FEWEST, CheckedProbes
from csulora_callback.corrector import SafetyCorrector
from csulora_callback.method.search import smallest_strength
from csulora_callback.models.training_rows import fixed_sample
from csulora_callback.presets import Family

logger = logging.getLogger(__name__)


def divide(probes: CheckedProbes, reads: bool) -> tuple[CheckedProbes, CheckedProbes]:
    """The probes that a correction reads, and those that say what it keeps.

    What a correction reads says too much of what it keeps. So where it reads, it reads a fixed half, drawn at random
    as files are often sorted by topic, and the other half is measured by; otherwise both are all of them.

    Raises:
        ValueError: if there are too few to measure by.

    Example:
        >>> prompts = [[place] for place in range(40)]
        >>> probes = CheckedProbes(prompts, [[1]] * 40, left_out=[], is_checked=False, from_cache=False)
        >>> read, measured = divide(probes, reads=True)
        >>> len(read.prompts), len(measured.prompts), [place for place in read.prompts if place in measured.prompts]
        (20, 20, [])
    """
    count = len(probes.prompts)
    first = fixed_sample(count, count // 2) if reads else []
    rest = [place for place in range(count) if place not in first]
    if len(rest) < FEWEST:
        why = "target, as a data-aware correction reads one half and the other is measured by" if reads else "target"
        raise ValueError(
            f"`probes`: expected at least {2 * FEWEST if reads else FEWEST} that the aligned model refuses for a "
            f"{why}, but got {count}. Pass more, or probes='builtin', or a penalty that has its strength, such as "
            "Penalty.guard(10)."
        )
    return (_those(probes, first), _those(probes, rest)) if reads else (probes, probes)


def _those(probes: CheckedProbes, places: Sequence[int]) -> CheckedProbes:
    prompts, beginnings = ([rows[place] for place in places] for rows in (probes.prompts, probes.beginnings))
    return replace(probes, prompts=prompts, beginnings=beginnings)


class Target:
    """Gives a corrector the smallest strength of a preset for which the corrected model keeps enough refusals.

    Args:
        share: of ``csulora/refusal_kept``, in (0, 1].
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

        def kept(strength: float) -> float:
            if not strength:
                return self.refusals.read().kept
            corrector.penalize(self.family(strength))
            with corrector.corrected():
                return self.refusals.read().kept

        found = smallest_strength(kept, self.share)
        penalty = self.family(found.strength)
        corrector.penalize(penalty, {"share": self.share, "kept": found.kept, "prompts": len(self.refusals)})
        if not found.is_enough and not self._warned and self.refusals.processes.rank == 0:
            self._warned = True
            logger.warning(
                "`target`: expected a correction that keeps %.0f %% of the refusals, but %s, the strongest that is "
                "tried, keeps %.0f %%. It is what is saved. Another penalty may keep more.",
                100 * self.share,
                penalty,
                100 * found.kept,
            )
