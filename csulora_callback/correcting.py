"""The one way from an adapter's factors to corrected ones: a live model's, a dictionary's, or a folder's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from csulora_callback.corrected import CorrectedAdapter, record_of
from csulora_callback.inspection import Inspection
from csulora_callback.method.correction import Correction, correct
from csulora_callback.method.drift import SafetyDrift
from csulora_callback.method.gauge import CorrectionOverflowError
from csulora_callback.method.measure import Drift, measure_kept
from csulora_callback.method.penalty import Penalty
from csulora_callback.method.token_space import InputGain, TokenSystem, gains_of, input_gain, token_systems
from csulora_callback.models.activations import Activations, Texts
from csulora_callback.models.adapters import AdaptedLayer
from csulora_callback.models.factors import Factors
from csulora_callback.models.saved_adapter import SavedLayer
from csulora_callback.subspace import SafetySubspace, oriented_basis

Rank = Literal["truncate", "expand"]
STRENGTH = "csulora/strength"
"""The metric that says which strength was found, where one was looked for."""


class Correcting:
    """What a correction is made with, whatever the factors are.

    Args:
        adapter: its name, for the record.
        layers: what the adapter is attached to, by module name; their scalings are read at every correction.
        subspace: must hold a basis, of the right shape, for every layer.
        penalty: the table of multipliers.
        rank: see :func:`~csulora_callback.correct`.
        chosen: how the penalty's strength was found, if it was looked for; a section of records.
        notes: further sections of records, as they are when a record is asked for.

    Raises:
        ValueError: if a layer has no basis in ``subspace`` or one of another shape; the module is named.

    Example:
        >>> import torch
        >>> from csulora_callback import Penalty, SafetySubspace
        >>> base, aligned = torch.nn.Sequential(torch.nn.Linear(8, 6)), torch.nn.Sequential(torch.nn.Linear(8, 6))
        >>> subspace = SafetySubspace.estimate(base, aligned, rank=2, progress=False)
        >>> layers = {"0": SavedLayer(shape=(6, 1, 8), scaling=2.0, stored_transposed=False)}
        >>> correcting = Correcting("default", layers, subspace, Penalty.projection())
        >>> done = correcting.correct({"0": (torch.ones(1, 8), torch.ones(6, 1))})
        >>> 0 < done.metrics["csulora/attenuation"] < 1
        True
    """

    def __init__(
        self,
        adapter: str,
        layers: Mapping[str, AdaptedLayer | SavedLayer],
        subspace: SafetySubspace,
        penalty: Penalty,
        rank: Rank = "truncate",
        chosen: Mapping[str, float] | None = None,
        notes: Mapping[str, object] | None = None,
    ) -> None:
        self.adapter, self.layers, self.subspace, self.penalty, self.rank = adapter, layers, subspace, penalty, rank
        self.chosen, self._notes = chosen, {} if notes is None else notes
        self._bases = {name: oriented_basis(subspace, name, layer) for name, layer in layers.items()}
        self._systems: tuple[Activations, dict[str, TokenSystem]] | None = None

    def gains(self, activations: Activations | None, device: torch.device | str) -> dict[str, InputGain] | None:
        """What a data-aware penalty makes of the activations; ``None`` for every other penalty."""
        if self.penalty.on_probes is None:
            return None
        if self._systems is None or self._systems[0] is not activations:  # another strength solves nothing anew
            self._systems = None  # let go of the old ones first: they are large
            self._systems = activations, token_systems(activations.task, activations.probes, device=device)
        return gains_of(self._systems[1], self.penalty.on_probes, device)

    def correct(
        self, raw: Factors, gains: Mapping[str, InputGain] | None = None, texts: Texts | None = None
    ) -> CorrectedAdapter:
        """The correction of ``raw``, on the factors' device and in their dtype.

        Args:
            raw: finite factors of these layers.
            gains: of :meth:`gains`; where a data-aware penalty has none of a module, nothing of it is attenuated.
            texts: what the activations are of, to be kept with the result; the record names their refused rows.

        Raises:
            CorrectionOverflowError: if the corrected factors would overflow their dtype; the module is named.
        """
        corrections = {name: self._correct(name, *raw[name], gains) for name in raw}
        drift = SafetyDrift()
        for name in sorted(corrections):  # files hold modules in another order than models, and sums round by it
            drift.update(corrections[name], self.subspace[name])
        metrics = drift.compute()
        if self.chosen is not None:
            metrics[STRENGTH] = self.penalty.parameters["strength"]
        corrected = {name: (correction.lora_A, correction.lora_B) for name, correction in corrections.items()}
        record = self._recorder(raw, corrected, corrections, metrics, "corrected", texts)
        return CorrectedAdapter(raw, corrected, metrics, record, texts)

    def left_raw(self, raw: Factors, reason: str, texts: Texts | None = None) -> CorrectedAdapter:
        """What stands for a correction that could not be made: the raw factors, and a record that says so."""
        record = self._recorder(raw, raw, {}, {}, f"not corrected: {reason}", texts)
        return CorrectedAdapter(raw, raw, {}, record, texts)

    def inspect(self, states: Mapping[str, Factors]) -> dict[str, Inspection]:
        """The drift of every module in each of several states of the adapter, as records have it."""
        return {
            state: Inspection({n: self._drift(n, factors[n], layer.scaling) for n, layer in self.layers.items()})
            for state, factors in states.items()
        }

    def _drift(self, name: str, factors: tuple[Tensor, Tensor], scaling: float) -> Drift:
        A, B = (factor.cpu() for factor in factors)  # not every device has float64
        return measure_kept(A, B, *self._bases[name], self.subspace[name], scaling)

    def _correct(self, name: str, lora_A: Tensor, lora_B: Tensor, gains: Mapping[str, InputGain] | None) -> Correction:
        U, V = (side.to(lora_A.device) for side in self._bases[name])
        gain = None
        if gains is not None:
            unread = torch.empty(0, lora_A.shape[1])  # nothing to attenuate by
            gain = gains[name] if name in gains else input_gain(unread, unread, self.penalty.on_probes)
        try:
            return correct(lora_A, lora_B, U, V, self.penalty, self.layers[name].scaling, self.rank, gain)
        except CorrectionOverflowError as error:
            raise CorrectionOverflowError(f"module '{name}': {error}") from error

    def _recorder(
        self,
        raw: Factors,
        corrected: Factors,
        corrections: dict[str, Correction],
        metrics: dict[str, float],
        status: str,
        texts: Texts | None,
    ) -> Callable[[], dict]:
        scalings = {name: layer.scaling for name, layer in self.layers.items()}
        measured = partial(self._measured, {"raw": raw, "corrected": corrected}, scalings)
        about = {
            "status": status,
            "adapter": self.adapter,
            "penalty": self.penalty.to_json(),
            "rank": self.rank,
            "subspace": {
                "fingerprint": self.subspace.fingerprint,
                "energy_kept": self.subspace.energy_kept,
                **self.subspace.metadata,
            },
            **_refused_rows(texts),
        }
        if self.chosen is not None:
            about["target"] = self.chosen
        return partial(record_of, raw, corrected, corrections, metrics, scalings, measured, about, self._notes)

    def _measured(self, states: Mapping[str, Factors], scalings: Mapping[str, float]) -> dict[str, dict]:
        """Of each module what its subspace is, and where the update lies relative to it before and after."""
        return {
            name: {
                "subspace": {
                    "rank": len(self.subspace[name].singular_values),
                    "displacement": self.subspace[name].displacement,
                    "energy_kept": self.subspace[name].energy,
                },
                "drift": {s: asdict(self._drift(name, states[s][name], scalings[name])) for s in states},
            }
            for name in self.layers
        }


def _refused_rows(texts: Texts | None) -> dict[str, dict]:
    """A section of the record: which of the sampled rows do not count as the task, by their places in texts.json."""
    if texts is None or not texts.screened:
        return {}
    return {"refused_rows": {"screened": len(texts.screened), "places": list(texts.refused)}}
