"""The one way from an adapter's factors to corrected ones: a live model's, a dictionary's, or a folder's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Literal

import torch

from csulora_callback.corrected import CorrectedAdapter, record_of
from csulora_callback.inspection import Inspection
from csulora_callback.method.closest import correct_each
from csulora_callback.method.drift import Effect, drift_metrics
from csulora_callback.method.forecast import foresee
from csulora_callback.method.grams import Grams
from csulora_callback.method.measure import Drift, chance_shares, drift_of, kept_displacement
from csulora_callback.method.one_hot import OneHotGain, OneHotSystem, input_gains_of, input_systems
from csulora_callback.method.outcome import Outcome
from csulora_callback.method.penalty import BLOCKS, Penalty
from csulora_callback.method.precision import width_of_logs, width_on
from csulora_callback.method.token_space import InputGain, TokenSystem, input_gain
from csulora_callback.models.activations import Activations, Texts
from csulora_callback.models.factors import Factors
from csulora_callback.models.names import owner_of_bias
from csulora_callback.models.parts import Layer
from csulora_callback.models.slots import bias_of
from csulora_callback.models.wholes import Whole, check_reads_vectors
from csulora_callback.stacks import Stack, Stacks
from csulora_callback.subspace import SafetySubspace
from csulora_callback.subspace_sides import oriented_basis
from csulora_callback.whole_modules import WholeModules

Rank = Literal["truncate", "expand"]
Gains = Mapping[str, InputGain | OneHotGain]
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
        passing: what is trained beside the layers and not corrected, by name, and why.

    Attributes:
        passing: that, and of the layers those rows that have no counterpart.

    Raises:
        ValueError: if a layer has no basis in ``subspace`` or one of another shape; the module is named.

    Example:
        >>> import torch
        >>> from csulora_callback import Penalty, SafetySubspace
        >>> from csulora_callback.models.saved_adapter import SavedLayer
        >>> base, aligned = torch.nn.Sequential(torch.nn.Linear(8, 6)), torch.nn.Sequential(torch.nn.Linear(8, 6))
        >>> subspace = SafetySubspace.estimate(base, aligned, rank=2, progress=False)
        >>> from csulora_callback.models.saved_adapter import SavedLayer
        >>> layers = {"0": SavedLayer(shape=(6, 1, 8), scaling=2.0, stored_transposed=False)}
        >>> correcting = Correcting("default", layers, subspace, Penalty.projection())
        >>> done = correcting.correct({"0": (torch.ones(1, 8), torch.ones(6, 1))})
        >>> 0 < done.metrics["csulora/attenuation"] < 1
        True
    """

    def __init__(
        self,
        adapter: str,
        layers: Mapping[str, Layer],
        subspace: SafetySubspace,
        penalty: Penalty,
        rank: Rank = "truncate",
        chosen: Mapping[str, float] | None = None,
        notes: Mapping[str, object] | None = None,
        passing: Mapping[str, str] | None = None,
    ) -> None:
        self.adapter, self.layers, self.subspace, self.penalty, self.rank = adapter, layers, subspace, penalty, rank
        self.chosen, self._notes = chosen, {} if notes is None else notes
        if penalty.on_probes is not None:
            check_reads_vectors(layers)
        self._wholes = WholeModules({n: each for n, each in layers.items() if isinstance(each, Whole)}, subspace)
        self.passing = {**(passing or {}), **self._wholes.passing}
        pairs = {name: layer for name, layer in layers.items() if name not in self._wholes}
        self._bases = {name: oriented_basis(subspace, name, layer) for name, layer in pairs.items()}
        self._stacks = Stacks({name: (own.U, own.V, own.singular_values) for name, own in self._bases.items()})
        self._bases |= self._wholes.bases
        self._chances = {name: chance_shares(own.U.shape, own.V.shape) for name, own in self._bases.items()}
        self._displacements = {name: kept_displacement(own) for name, own in self._bases.items()}
        self._systems: tuple[Activations, dict[str, TokenSystem | OneHotSystem]] | None = None

    def gains(self, activations: Activations | None, device: torch.device | str) -> Gains | None:
        """What a data-aware penalty makes of the activations; ``None`` for every other penalty.

        Raises:
            ValueError: if they were read with the prefix that all probes share and the penalty skips it, or without.
        """
        if self.penalty.on_probes is None:
            return None
        if activations.skips_prefix != self.penalty.skips_prefix:
            how = "without the prefix that all probes share" if self.penalty.skips_prefix else "of whole probes"
            raise ValueError(
                f"`activations`: expected those {how} for the penalty {self.penalty}, but they were read otherwise. "
                "Pass Activations.read(adapter, texts, skip_prefix=penalty.skips_prefix)."
            )
        if self._systems is None or self._systems[0] is not activations:  # another strength solves nothing anew
            self._systems = None  # let go of the old ones first: they are large
            self._systems = activations, input_systems(activations.task, activations.probes, device=device)
        return input_gains_of(self._systems[1], self.penalty.on_probes, device)

    def correct(self, raw: Factors, gains: Gains | None = None, texts: Texts | None = None) -> CorrectedAdapter:
        """The correction of ``raw``, on the factors' device and in their dtype.

        Args:
            raw: finite factors of these layers.
            gains: of :meth:`gains`; where a data-aware penalty has none of a module, nothing of it is attenuated.
            texts: what the activations are of, to be kept with the result; the record names their refused rows.

        Raises:
            CorrectionOverflowError: if the corrected factors would overflow their dtype; the module is named.
        """
        corrections: dict[str, Outcome] = {}
        for stack in self._stacks.of(self._pairs(raw)):
            corrections |= zip(stack.names, self._correct(stack, gains), strict=True)
        corrections |= self._wholes.correct(raw, self.penalty, gains)
        corrections = {name: corrections[name] for name in raw}
        effects = {name: Effect.of(correction, self._bases[name]) for name, correction in corrections.items()}
        metrics = self._metrics(effects)
        corrected = {name: correction.factors for name, correction in corrections.items()}
        corrected |= {name: bias_of(*pair) for name, pair in corrected.items() if owner_of_bias(name) is not None}
        record = self._recorder(raw, corrected, corrections, effects, metrics, "corrected", texts)
        return CorrectedAdapter(raw, corrected, metrics, record, texts)

    def measure(self, raw: Factors, gains: Gains | None = None) -> dict[str, float] | None:
        """The metrics of :meth:`correct`, without the correction, from products in float32.

        They are right to 1e-4 and usually 1e-6; roots where they are nearly 0 to less, ``csulora/relative_change`` to
        1e-3 and ``csulora/truncation_error`` to 1e-2.
        ``None`` where only the correction can say: where factors are not finite, too large or too small for these
        products, or cancel each other.
        """
        by_rank: dict[tuple, list[tuple[Stack, Grams]]] = {}
        for stack in self._stacks.of(self._pairs(raw)):
            sides = stack.U, stack.V, stack.singular_values
            wide, by = width_of_logs(stack.lora_A.device), self._input_gains(stack, gains)
            grams = Grams.of(stack.lora_A, stack.lora_B, *sides, wide, by)
            key = stack.lora_A.device, stack.lora_A.shape[1], stack.lora_A.dtype, stack.lora_B.dtype
            by_rank.setdefault(key, []).append((stack, grams))
        effects: dict[str, Effect] = {}
        for (_, _, *dtypes), parts in by_rank.items():
            names = [name for stack, _ in parts for name in stack.names]
            known = ([of[name] for name in names] for of in (self._scalings(), self._chances, self._displacements))
            largest = min(torch.finfo(dtype).max for dtype in dtypes)
            found = foresee(Grams.joined([grams for _, grams in parts]), *known, self.penalty, largest)
            if found is None:
                return None
            effects |= zip(names, found, strict=True)
        empty = [name for name, effect in effects.items() if effect.raw.total_energy == 0.0]
        if any(bool(raw[name][0].any() and raw[name][1].any()) for name in empty):  # too small for float32
            return None
        measured = self._wholes.correct(raw, self.penalty, gains, measure_only=True)
        return self._metrics(effects | {name: Effect.of(each, self._bases[name]) for name, each in measured.items()})

    def left_raw(self, raw: Factors, reason: str, texts: Texts | None = None) -> CorrectedAdapter:
        """What stands for a correction that could not be made: the raw factors, and a record that says so."""
        record = self._recorder(raw, raw, {}, {}, {}, f"not corrected: {reason}", texts)
        return CorrectedAdapter(raw, raw, {}, record, texts)

    def inspect(self, states: Mapping[str, Factors]) -> dict[str, Inspection]:
        """The drift of every module in each of several states of the adapter, as records have it."""
        return {state: Inspection(self._drifts(factors, self._scalings())) for state, factors in states.items()}

    def _drifts(self, factors: Factors, scalings: Mapping[str, float]) -> dict[str, Drift]:
        drifts: dict[str, Drift] = {}
        for stack in self._stacks.of(self._pairs({name: factors[name] for name in self.layers})):
            sides = stack.U, stack.V, stack.singular_values
            grams = Grams.of(stack.lora_A, stack.lora_B, *sides, width_on(stack.lora_A.device))
            numbers = torch.cat([grams.energies(), grams.along()[:, None]], dim=1).tolist()
            for name, (*squares, along) in zip(stack.names, numbers, strict=True):
                s, (chance, displacement) = scalings[name], (of[name] for of in (self._chances, self._displacements))
                energy = {block: s * s * square for block, square in zip(BLOCKS, squares, strict=True)}
                drifts[name] = drift_of(energy, chance, s * along, displacement)
        drifts |= self._wholes.drifts(factors)
        return {name: drifts[name] for name in self.layers}

    def _pairs(self, factors: Factors) -> Factors:
        return {name: tensors for name, tensors in factors.items() if name not in self._wholes}

    def _correct(self, stack: Stack, gains: Gains | None) -> list[Outcome]:
        scalings = [self.layers[name].scaling for name in stack.names]
        factors, sides = (stack.lora_A, stack.lora_B), (stack.U, stack.V)
        by, wide = self._input_gains(stack, gains), width_on(stack.lora_A.device)
        return correct_each(*factors, *sides, self.penalty, scalings, self.rank, by, stack.names, wide)

    def _input_gains(self, stack: Stack, gains: Gains | None) -> list[InputGain | OneHotGain] | None:
        if gains is None:
            return None
        unread = torch.empty(0, stack.lora_A.shape[-1])  # nothing to attenuate by
        return [
            gains[name] if name in gains else input_gain(unread, unread, self.penalty.on_probes)
            for name in stack.names
        ]

    def _scalings(self) -> dict[str, float]:
        return {name: layer.scaling for name, layer in self.layers.items()}

    def _metrics(self, effects: Mapping[str, Effect]) -> dict[str, float]:
        # Files hold modules in another order than models, and sums round by it.
        metrics = drift_metrics(effects[name] for name in sorted(effects))
        if self.chosen is not None:
            metrics[STRENGTH] = self.penalty.parameters["strength"]
        return metrics

    def _recorder(
        self,
        raw: Factors,
        corrected: Factors,
        corrections: Mapping[str, Outcome],
        effects: Mapping[str, Effect],
        metrics: dict[str, float],
        status: str,
        texts: Texts | None,
    ) -> Callable[[], dict]:
        scalings = self._scalings()
        measured = partial(self._measured, effects, corrected, scalings)
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
            **_sampled_rows(texts),
        }
        if self.passing:
            about["not_corrected"] = self.passing
        if self.chosen is not None:
            about["target"] = self.chosen
        return partial(record_of, raw, corrected, corrections, metrics, scalings, measured, about, self._notes)

    def _measured(
        self, effects: Mapping[str, Effect], corrected: Factors, scalings: Mapping[str, float]
    ) -> dict[str, dict]:
        """Of each module what its subspace is, and where the update lies relative to it before and after."""
        after = self._drifts(corrected, scalings)
        return {
            name: {
                "subspace": {
                    "rank": self._bases[name].U.shape[1],
                    "displacement": self._bases[name].displacement,
                    "energy_kept": self._bases[name].energy,
                },
                "drift": {"raw": asdict(effect.raw), "corrected": asdict(after[name])},
            }
            for name, effect in effects.items()
        }


def _sampled_rows(texts: Texts | None) -> dict[str, object]:
    """Of the record: which sampled rows do not count, and which had images, by place in texts.json; how many lack."""
    if texts is None:
        return {}
    screened = {"screened": len(texts.screened), "places": list(texts.refused)}
    counts = {"left_out_rows": texts.left_out, "rows_with_inputs": sorted(texts.inputs)}
    about = {"refused_rows": screened} if texts.screened else {}
    return about | {key: value for key, value in counts.items() if value}
