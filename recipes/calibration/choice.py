"""The choice: of many penalties and ranks, the one that costs least of the task and keeps attacks below a target.

Where there are harmless prompts to judge by, also refusals of these below a limit.

Settings are chosen on one half of the prompts, *tuning*; the chosen one alone is then judged on the other, *held out*.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from csulora_callback import Penalty, wilson_interval
from csulora_callback.method.basis import LEAST_RANK
from csulora_callback.presets import DATA_AWARE
from recipes.labs.chat import Answer
from recipes.schema.recipe import Calibrate, make_penalty

ALIGNED, RAW = "aligned model", "raw LoRA"  # what a correction lies between

_SHARES = (64, 32, 16)  # of a module's smaller side; a thirty-second is what the callback takes by itself


@dataclass(frozen=True)
class Candidate:
    """A setting of the callback; ``strength`` is ``None`` for a preset that has none."""

    preset: str
    strength: float | None
    rank: int

    def __str__(self) -> str:
        strength = "" if self.strength is None else f"({exactly(self.strength)})"
        return f"{self.preset}{strength}{f' at rank {self.rank}' if self.has_rank else ''}"

    @property
    def has_rank(self) -> bool:
        """Whether its correction depends on the rank: what is measured by activations does not."""
        return self.preset not in DATA_AWARE

    def penalty(self) -> Penalty:
        """The penalty that it names."""
        return make_penalty(self.preset, self.strength)

    def code(self, texts: str = "probes=...") -> str:
        """The arguments that give it to :class:`csulora_callback.CSULoRACallback`; ``texts`` where it reads some."""
        strength = "" if self.strength is None else exactly(self.strength)
        strength = 'float("inf")' if strength == "inf" else strength
        before, after = (f"rank={self.rank}, ", "") if self.has_rank else ("", f", {texts}")
        return f"{before}penalty=Penalty.{self.preset}({strength}){after}"


def exactly(number: float) -> str:
    """As short as it can be written without becoming another number."""
    short = f"{number:g}"
    return short if float(short) == number else repr(number)


def ranks_for(smaller_sides: Iterable[int]) -> list[int]:
    """Ranks to try on modules whose smaller sides are given: shares of the largest, and four at least."""
    side = max(smaller_sides)
    return sorted({max(LEAST_RANK, side // share) for share in _SHARES})


def candidates(settings: Calibrate, ranks: Sequence[int]) -> list[Candidate]:
    """Presets × strengths × ranks."""
    tried = [
        Candidate(preset, strength, rank)
        for preset, strengths in settings.presets.items()
        for rank in ranks
        for strength in (strengths or [None])
    ]
    return [one for one in tried if one.has_rank or one.rank == ranks[0]]


@dataclass(frozen=True)
class Judgement:
    """How a model does on one half.

    Attributes:
        answers: to prompts that are to be refused.
        task_loss: of the user's task.
        harmless_answers: to prompts that look like them and are to be answered, where there are some.
    """

    answers: tuple[Answer, ...]
    task_loss: float
    harmless_answers: tuple[Answer, ...] = ()

    @property
    def prompts(self) -> int:
        """How many there are."""
        return len(self.answers)

    @property
    def succeeded(self) -> int:
        """Prompts that were not refused: attacks that succeeded."""
        return sum(not answer.refused for answer in self.answers)

    @property
    def attack_success(self) -> float:
        """Share of the prompts that were not refused."""
        return self.succeeded / self.prompts

    def interval(self) -> tuple[float, float]:
        """Wilson's for the attack success, 95 %."""
        return wilson_interval(self.succeeded, self.prompts)

    def newly_refused(self, aligned: Judgement) -> tuple[int, int]:
        """How many harmless prompts it refuses of those that the aligned model answers, and how many these are.

        What the aligned model refuses itself no correction can be blamed for.
        """
        pairs = zip(self.harmless_answers, aligned.harmless_answers, strict=True)
        refused = [own.refused for own, before in pairs if not before.refused]
        return sum(refused), len(refused)


class Verdict(Enum):
    """What a calibration found."""

    nothing_to_correct = "the raw adapter meets the target"
    out_of_reach = "the aligned model does not meet the target"
    none = "no setting meets the target"
    chosen = "a setting was chosen"


@dataclass(frozen=True)
class Calibration:
    """What was measured without a correction, all candidates on the tuning half, and the chosen one on the other.

    ``ends`` is by ``ALIGNED`` and ``RAW``, and by split; ``limit`` is of the share that is newly refused.
    """

    target: float
    limit: float
    ends: Mapping[str, Mapping[str, Judgement]]
    tuning: list[tuple[Candidate, Judgement]]
    chosen: Candidate | None
    held_out: Judgement | None

    @property
    def verdict(self) -> Verdict:
        """Which of the four it is; the first two are known before anything is tried."""
        if self.chosen is not None:
            return Verdict.chosen
        if self.meets(self.ends[RAW]["tuning"]):
            return Verdict.nothing_to_correct
        return Verdict.none if self.meets(self.ends[ALIGNED]["tuning"]) else Verdict.out_of_reach

    @property
    def has_harmless(self) -> bool:
        """Whether there are harmless prompts to judge by, and so a limit."""
        return bool(self.ends[ALIGNED]["tuning"].harmless_answers)

    def withstands(self, judgement: Judgement) -> bool:
        """Whether attack success is at most the target."""
        return judgement.attack_success <= self.target

    def meets(self, judgement: Judgement) -> bool:
        """Whether both are as asked for, on the tuning half."""
        refused, answered = judgement.newly_refused(self.ends[ALIGNED]["tuning"])
        return self.withstands(judgement) and refused <= self.limit * answered


def choose(
    candidates: Iterable[Candidate],
    ends: Mapping[str, Mapping[str, Judgement]],
    target: float,
    limit: float,
    try_out: Callable[[Candidate], Judgement],
    ship: Callable[[Candidate], Judgement],
) -> Calibration:
    """Choose the candidate with the least task loss whose attack success on the tuning half is at most ``target``.

    And which refuses at most the share ``limit`` of the harmless prompts that the aligned model answers, where
    there are harmless ones.

    Of equal losses the first one wins. Nothing is tried where the raw adapter meets the target already, or where the
    aligned model does not: a correction leads back to it, and cannot be asked to go below.

    Args:
        candidates: what to choose from.
        ends: what was measured without a correction.
        target: a share in ``[0, 1]``.
        limit: likewise.
        try_out: judges a candidate on the tuning half.
        ship: makes what is shipped of the chosen one, and judges that on the held-out half.
    """
    untried = Calibration(target, limit, ends, [], None, None)
    if untried.verdict is not Verdict.none:
        return untried
    tuning = [(candidate, try_out(candidate)) for candidate in candidates]
    safe = [(judgement.task_loss, place) for place, (_, judgement) in enumerate(tuning) if untried.meets(judgement)]
    if not safe:
        return replace(untried, tuning=tuning)
    chosen = tuning[min(safe)[1]][0]
    return replace(untried, tuning=tuning, chosen=chosen, held_out=ship(chosen))
