"""A drift budget: what a run may measure at most, or at least, and what of it was exceeded, and when."""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from csulora_callback.behaviour import BEHAVIOUR_KEYS
from csulora_callback.method.drift import DRIFT_KEYS
from csulora_callback.models.processes import Processes
from csulora_callback.record import is_number

logger = logging.getLogger(__name__)

REFUSAL = "csulora/refusal_kept_corrected"
"""What ``min_refusal`` is the least of: the refusing that is left in what would be saved."""

UNMEASURED = dict.fromkeys(DRIFT_KEYS, math.nan)
"""The drift of factors that are not finite, which have none: within no budget."""

NOTE = "budget"
"""The section of records that says what was allowed, and what was exceeded."""

ON_EXCEED = ("warn", "stop")


@dataclass(frozen=True)
class Limit:
    """The most that one metric may be, or the least.

    Example:
        >>> limit = Limit("csulora/alignment_undone", 0.2, "max_drift")
        >>> limit.holds(0.2), limit.holds(float("nan"))
        (True, False)
        >>> limit.broken_by(0.31), limit.broken_by(0.2001)
        ('is 0.31, more than the 0.2 that max_drift allows', 'is 0.2001, more than the 0.2 that max_drift allows')
    """

    key: str
    bound: float
    argument: str

    def holds(self, value: float) -> bool:
        """Whether a value is within it; not a number is not."""
        return value >= self.bound if self.argument == "min_refusal" else value <= self.bound

    def broken_by(self, value: float) -> str:
        """What is wrong with a value that is not within it, in words."""
        asked = f"less than the {self.bound:g} that {self.argument} asks for"
        if self.argument == "max_drift":
            asked = f"more than the {self.bound:g} that {self.argument} allows"
        if math.isnan(value):
            return f"is not a number, which may be {asked}"
        short = f"{value:.3g}"
        return f"is {value if self.holds(float(short)) else short}, {asked}"  # never "0.2, more than the 0.2"


class Budget:
    """What a run may drift, and in which respects it did more than that.

    Args:
        max_drift: by logged key the most that it may be.
        min_refusal: the least that ``csulora/refusal_kept_corrected`` may be.
        on_exceed: ``"warn"``, or ``"stop"`` to end training too.
        has_probes: whether behaviour is measured.

    Raises:
        ValueError: naming the argument, for keys that are not logged, values out of range, limits on behaviour without
            probes, and ``"stop"`` without limits.

    Example:
        >>> budget = Budget(max_drift={"csulora/alignment_undone": 0.2}, on_exceed="stop")
        >>> record = budget.begin()
        >>> budget.check({"csulora/alignment_undone": 0.1}, step=20)
        []
        >>> budget.check({"csulora/alignment_undone": 0.31}, step=40)
        ['csulora/alignment_undone is 0.31, more than the 0.2 that max_drift allows, at step 40']
        >>> budget.check({"csulora/alignment_undone": 0.35}, step=60)  # said once
        []
        >>> len(record["budget"]["exceeded"])
        1
    """

    def __init__(
        self,
        max_drift: Mapping[str, float] | None = None,
        min_refusal: float | None = None,
        on_exceed: Literal["warn", "stop"] = "warn",
        has_probes: bool = False,
    ) -> None:
        if on_exceed not in ON_EXCEED:
            raise ValueError(f"`on_exceed`: expected 'warn' or 'stop', but got {on_exceed!r}.")
        if max_drift is not None:
            _check_max_drift(max_drift, has_probes)
        if min_refusal is not None:
            _check_min_refusal(min_refusal, has_probes)
        if on_exceed == "stop" and max_drift is None and min_refusal is None:
            raise ValueError(
                "`on_exceed`: expected `max_drift` or `min_refusal` beside 'stop', but got neither. Pass "
                "max_drift={'csulora/alignment_undone': 0.05}, or min_refusal=0.8 with probes."
            )
        self.max_drift = {} if max_drift is None else {key: float(most) for key, most in max_drift.items()}
        self.min_refusal = None if min_refusal is None else float(min_refusal)
        self.on_exceed = on_exceed
        self.limits = [Limit(key, most, "max_drift") for key, most in self.max_drift.items()]
        if self.min_refusal is not None:
            self.limits.append(Limit(REFUSAL, self.min_refusal, "min_refusal"))
        self.begin()

    @property
    def stops(self) -> bool:
        """Whether training ends where it is exceeded."""
        return self.on_exceed == "stop"

    def begin(self) -> dict[str, dict]:
        """Check anew; returns a section for records, which fills as limits are exceeded, or none without limits."""
        self.exceeded: list[str] = []
        self._broken: set[str] = set()
        self._measured: set[str] = set()
        if not self.limits:
            return {}
        allowed = {"max_drift": self.max_drift, "min_refusal": self.min_refusal, "on_exceed": self.on_exceed}
        return {NOTE: {**allowed, "exceeded": self.exceeded}}

    def check(self, measured: Mapping[str, float], step: int) -> list[str]:
        """The limits that are exceeded for the first time, in words, with a warning for each.

        Collective where there are limits and several processes: the first one's numbers count, so that all stop alike.

        Args:
            measured: any metrics; limits on others are not looked at.
            step: at which.
        """
        if not self.limits:
            return []
        processes = Processes.all()
        measured, found = processes.from_first(dict(measured)), []
        self._measured |= measured.keys()
        for limit in self.limits:
            if limit.key in measured and limit.key not in self._broken and not limit.holds(measured[limit.key]):
                self._broken.add(limit.key)
                found.append(f"{limit.key} {limit.broken_by(measured[limit.key])}, at step {step}")
        self.exceeded += found
        if processes.rank == 0:
            for reason in found:
                logger.warning("The drift budget is exceeded, and training %s: %s.", self._then, reason)
        return found

    def end(self) -> None:
        """Warn of limits that nothing was measured for: a budget that was never looked at was not kept."""
        never = [limit.key for limit in self.limits if limit.key not in self._measured]
        if never and Processes.all().rank == 0:
            logger.warning(
                "The drift budget was not checked for %s: nothing measured it in this run. Drift is measured at log "
                "records and saves, behaviour at evaluations, saves and every `probe_every_n_steps`.",
                ", ".join(never),
            )

    @property
    def _then(self) -> str:
        return "stops with a checkpoint saved" if self.stops else "goes on"


def _check_max_drift(max_drift: Mapping[str, float], has_probes: bool) -> None:
    if not isinstance(max_drift, Mapping) or not max_drift:
        raise ValueError(
            "`max_drift`: expected logged keys with the most that each may be, such as "
            f"{{'csulora/alignment_undone': 0.05}}, but got {max_drift!r}."
        )
    for key, most in max_drift.items():
        if key not in (*DRIFT_KEYS, *BEHAVIOUR_KEYS):
            near = difflib.get_close_matches(str(key), [*DRIFT_KEYS, *BEHAVIOUR_KEYS])
            known = f"Did you mean {' or '.join(near)}?" if near else f"Such are {', '.join(DRIFT_KEYS)}."
            raise ValueError(f"`max_drift`: expected keys that the callback logs, but got {key!r}. {known}")
        if key.startswith("csulora/refusal_"):
            raise ValueError(
                f"`max_drift`: expected keys of which less is safer, but got {key!r}, of which more is. For the least "
                f"that {REFUSAL} may be, pass min_refusal=0.8."
            )
        if key in BEHAVIOUR_KEYS and not has_probes:
            raise ValueError(
                f"`max_drift`: expected `probes` beside {key!r}, which is measured with them only, but got none. Pass "
                "probes='builtin' too."
            )
        if not is_number(most):
            raise ValueError(f"`max_drift`: expected a finite number for {key!r}, but got {most!r}.")


def _check_min_refusal(min_refusal: float, has_probes: bool) -> None:
    if not is_number(min_refusal) or not 0 < min_refusal <= 1:
        raise ValueError(
            "`min_refusal`: expected the least share of the refusals that is to be kept, above 0 and at most 1, but "
            f"got {min_refusal!r}."
        )
    if not has_probes:
        raise ValueError(
            "`min_refusal`: expected `probes` beside it, by which refusing is measured, but got none. Pass "
            "probes='builtin' too."
        )
