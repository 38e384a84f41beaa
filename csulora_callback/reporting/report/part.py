"""One correction as a page shows it: what its record, its logs and its results say, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from statistics import median

from csulora_callback.inspection import Inspection, recorded_inspections
from csulora_callback.method.penalty import BLOCKS, in_words
from csulora_callback.presets import DATA_AWARE
from csulora_callback.record import exceeded
from csulora_callback.reporting.inspection import BLOCK_NAMES, WORST
from csulora_callback.reporting.penalties import IN_WORDS
from csulora_callback.reporting.report.evaluation import Judged
from csulora_callback.reporting.report.runs import Run
from csulora_callback.reporting.report.words import ratio


@dataclass(frozen=True)
class Part:
    """What a template needs of one run.

    Attributes:
        run: the run.
        judged: the results of a recipe by method; those of this run have its name.
    """

    run: Run
    judged: Mapping[str, Judged]

    @property
    def name(self) -> str:
        """The run's."""
        return self.run.name

    @property
    def record(self) -> dict:
        """The run's."""
        return self.run.record

    @property
    def metrics(self) -> dict[str, float]:
        """Over all modules, by their names in logs; empty where nothing could be corrected."""
        return self.record["metrics"]

    @property
    def corrected(self) -> bool:
        """Whether it is what it is meant to be."""
        return self.record["status"] == "corrected"

    @property
    def penalty(self) -> str:
        """Its name and strength."""
        return in_words(self.record["penalty"])

    @property
    def does(self) -> str:
        """What such a penalty does."""
        return IN_WORDS[self.record["penalty"]["name"]]

    @property
    def exceeded(self) -> str | None:
        """What of a drift budget was exceeded, and what then became of training; ``None`` where nothing was."""
        return exceeded(self.record)

    @property
    def raw_is_saved(self) -> bool:
        """Whether the adapter beside the saved one is the same."""
        return self.record["raw_digest"] == self.record["corrected_digest"]

    @cached_property
    def inspections(self) -> dict[str, Inspection]:
        """Of the ``raw`` and the ``corrected`` state, as recorded; maybe none."""
        return recorded_inspections(self.record)

    @property
    def norms(self) -> tuple[float, float]:
        """``‖Δ‖`` and ``‖X‖``."""
        before = self.metrics["csulora/update_norm"]
        return before, before * (1.0 - self.metrics["csulora/attenuation"])

    @property
    def undone(self) -> tuple[float, float] | None:
        """Share of the alignment that the update takes back, before and after."""
        if not self.inspections:
            return None
        return self.inspections["raw"].together.undone, self.inspections["corrected"].together.undone

    def gains(self) -> list[dict]:
        """Of each block the factors that it was multiplied by, over the modules; none for a data-aware penalty."""
        gains = [module["gain"] for module in self.record["modules"].values() if "gain" in module]
        if self.record["penalty"]["name"] in DATA_AWARE or not gains:
            return []
        rows = []
        for block in BLOCKS:
            values = sorted(gain[block] for gain in gains)
            rows.append(
                {"block": BLOCK_NAMES[block], "least": values[0], "median": median(values), "most": values[-1]}
            )
        return rows

    def modules(self) -> list[dict]:
        """All modules in their order, each with its drift before and after, and what is recorded of its correction."""
        return [
            {"name": name, **self.record["modules"][name], **{s: i.modules[name] for s, i in self.inspections.items()}}
            for name in self.inspections["raw"].modules
        ]

    def worst(self) -> list[dict]:
        """The modules that undo most of the alignment before the correction, worst first."""
        raw, corrected = self.inspections["raw"], self.inspections["corrected"]
        whole = raw.together.displacement
        return [
            {
                "name": name,
                "raw": raw.modules[name],
                "corrected": corrected.modules[name],
                "of_whole": [ratio(0.0 - state.modules[name].along, whole) for state in (raw, corrected)],
            }
            for name in raw.worst(WORST)
        ]
