"""The adapter of one moment, raw and corrected, and what is recorded of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib.metadata import version

from csulora_callback.method.outcome import Outcome
from csulora_callback.models.activations import Texts
from csulora_callback.models.factors import Factors, digest, equal
from csulora_callback.record import FORMAT
from csulora_callback.sidecar import Sidecar

_VERSIONS = {package: version(package) for package in ("csulora-callback", "torch", "transformers", "peft")}


@dataclass(frozen=True, eq=False)  # tensors have no truth value to compare by
class CorrectedAdapter:
    """The adapter of one moment: its raw factors, the corrected ones, and the record for the sidecar.

    ``metrics`` holds the keys of :class:`~csulora_callback.SafetyDrift`; it is empty when the factors held NaN or Inf
    and nothing could be corrected (then ``corrected`` is ``raw``). ``make_record`` is called when the record is asked
    for: its digests cost more than everything else, and a log line needs none of it.
    """

    raw: Factors
    corrected: Factors
    metrics: dict[str, float]
    make_record: Callable[[], dict]
    texts: Texts | None = None

    @cached_property
    def record(self) -> dict:
        """What ``correction.json`` says."""
        return self.make_record()

    def held_as(self, factors: Factors) -> CorrectedAdapter:
        """The same where the corrected factors are held as ``factors``, maybe in another dtype."""
        if equal(factors, self.corrected):
            return self
        record = partial(_with, self, corrected_digest=digest(factors))
        return replace(self, corrected=factors, make_record=record)

    @property
    def sidecar(self) -> Sidecar:
        """What is written beside the corrected adapter, wherever it is saved."""
        return Sidecar(self.raw, self.record)

    @property
    def sidecar_of_checkpoint(self) -> Sidecar:
        """The same with the texts: training goes on from a checkpoint, and what is shipped must not hold its data."""
        return Sidecar(self.raw, self.record, self.texts)


def record_of(
    raw: Factors,
    corrected: Factors,
    corrections: Mapping[str, Outcome],
    metrics: dict[str, float],
    scalings: dict[str, float],
    measured: Callable[[], dict[str, dict]],
    about: dict,
    notes: Mapping[str, object],
) -> dict:
    """What ``correction.json`` says of a correction; there are none of its modules where none could be made.

    Args:
        raw: the factors before it.
        corrected: the factors after it.
        corrections: by module.
        metrics: over all modules.
        scalings: PEFT's, by module.
        measured: gives what else is recorded of each corrected module.
        about: status, and names of adapter, penalty and subspace.
        notes: further sections.
    """
    more = measured() if corrections else {}
    summaries = {name: {**_summary(correction), **more[name]} for name, correction in corrections.items()}
    return {
        "format": FORMAT,
        **about,
        "raw_digest": digest(raw),
        "corrected_digest": digest(corrected),
        "metrics": metrics,
        "modules": {name: {"scaling": scalings[name], **summaries.get(name, {})} for name in raw},
        "versions": _VERSIONS,
        **notes,
    }


def _with(adapter: CorrectedAdapter, **changed: object) -> dict:
    return {**adapter.record, **changed}


def _summary(correction: Outcome) -> dict:
    return {
        "energy": correction.energy,
        "relative_energy": correction.relative_energy,
        "gain": correction.gain,
        "relative_change": correction.relative_change,
        "truncation_error": correction.truncation_error,
    }
