"""The modules of an adapter that are trained whole, with their bases: each is corrected by itself, as they are few."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from csulora_callback.method.basis import Basis, displacement
from csulora_callback.method.drift import Effect
from csulora_callback.method.measure import Drift
from csulora_callback.method.penalty import Penalty
from csulora_callback.method.token_space import InputGain, input_gain
from csulora_callback.method.whole import WholeCorrection, correct_whole
from csulora_callback.models.factors import Factors
from csulora_callback.models.pair import CheckpointPair
from csulora_callback.models.wholes import Whole
from csulora_callback.subspace import SafetySubspace
from csulora_callback.subspace_sides import oriented_basis

_NEW = "new: base and aligned checkpoint do not both have them"
_ROWS = 2**10  # of a weight at a time


class WholeModules:
    """What :class:`~.correcting.Correcting` knows of them.

    Args:
        layers: by module name.
        subspace: must hold a basis for each, with the columns of its weight. Rows that it lacks pass; what it has of
            rows that the weight lacks, as of a vocabulary that was cut to the tokens in use, does not count.

    Attributes:
        bases: oriented as the layers: ``U`` on the output side.
        passing: which rows have no counterpart, by name, and why.

    Raises:
        ValueError: if there is none, or one of another shape; the module is named.

    Example:
        >>> WholeModules({}, SafetySubspace({}, {})).passing
        {}
    """

    def __init__(self, layers: Mapping[str, Whole], subspace: SafetySubspace) -> None:
        self._layers = layers
        self.bases: dict[str, Basis] = {}
        self.passing: dict[str, str] = {}
        for name, layer in layers.items():
            rows = layer.stored[0]
            held = len(subspace[name].U) if name in subspace else rows
            if held < rows:
                self.passing[f"{name}, rows {held} to {rows - 1}"] = _NEW
            own = oriented_basis(subspace, name, layer.with_rows(held))
            self.bases[name] = (
                subspace[name].first_rows(rows).oriented(layer.stored_transposed) if held > rows else own
            )

    def __contains__(self, name: str) -> bool:
        return name in self._layers

    def correct(
        self,
        factors: Factors,
        penalty: Penalty,
        gains: Mapping[str, InputGain] | None = None,
        measure_only: bool = False,
    ) -> dict[str, WholeCorrection]:
        """The correction of each; arguments as of :meth:`~.correcting.Correcting.correct`.

        Raises:
            CorrectionOverflowError: if a corrected weight would overflow its dtype; the module is named.
        """
        done = {}
        for name, layer in self._layers.items():
            (weight,), basis = factors[name], self.bases[name]
            by = None
            if gains is not None:
                unread = weight.new_empty(0, layer.shape[2])  # nothing to attenuate by
                by = gains.get(name) or input_gain(unread, unread, penalty.on_probes)
            sides = layer.aligned(), basis.U, basis.V
            done[name] = correct_whole(weight, *sides, penalty, layer.stored_transposed, by, name, measure_only)
        return done

    def drifts(self, factors: Factors, pair: CheckpointPair | None = None) -> dict[str, Drift]:
        """Where the update of each lies, and which way it points.

        Args:
            factors: with the weights of these modules.
            pair: the checkpoints that the subspace is of: with them ``⟨Δ, D⟩`` is that of the whole displacement.
        """
        measured = self.correct(factors, Penalty.table(), measure_only=True)
        drifts = {name: Effect.of(each, self.bases[name]).raw for name, each in measured.items()}
        if pair is None:
            return drifts
        return {name: replace(drift, **self._of_all(name, factors[name][0], pair)) for name, drift in drifts.items()}

    def _of_all(self, name: str, weight: Tensor, pair: CheckpointPair) -> dict[str, float]:
        D = displacement(pair.weights_for(name, [name]))
        before, count = self._layers[name].aligned(), min(len(D), len(weight))
        along = sum(
            ((after.to(D) - old.to(weight.dtype).to(D)).double() * each.double()).sum().item()
            for after, old, each in zip(*(t[:count].split(_ROWS) for t in (weight, before, D)), strict=True)
        )
        return {"along": along, "displacement": self.bases[name].displacement ** 2}
