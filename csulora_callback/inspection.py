"""What an adapter on disk does to the alignment, module by module, measured without changing anything."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from csulora_callback.method.basis import displacement
from csulora_callback.method.measure import Drift, along_displacement, measure, measure_kept, total
from csulora_callback.models.factors import Factors, all_finite
from csulora_callback.models.names import layer_and_kind
from csulora_callback.models.pair import CheckpointPair
from csulora_callback.models.saved_adapter import SavedAdapter
from csulora_callback.subspace import SafetySubspace
from csulora_callback.subspace_sides import oriented_basis
from csulora_callback.whole_modules import WholeModules


@dataclass(frozen=True)
class Inspection:
    """The drift of every adapted module, and of groups of them.

    Attributes:
        modules: by module name, in the adapter's order.

    Example:
        >>> drift = Drift(along=-1.0, displacement=4.0)
        >>> seen = Inspection({"layers.0.q_proj": drift, "layers.1.q_proj": drift})
        >>> seen.together.undone, list(seen.by_layer()), list(seen.by_kind())
        (0.25, ['layers.0', 'layers.1'], ['q_proj'])
    """

    modules: Mapping[str, Drift]

    @property
    def together(self) -> Drift:
        """Of all modules."""
        return total(self.modules.values())

    def by_layer(self) -> dict[str, Drift]:
        """Of each layer, in their order; of modules outside all layers last, under an empty name."""
        layers = self._by(lambda name: layer_and_kind(name)[0])
        return {layer: layers[layer] for layer in sorted(layers, key=_place)}

    def by_kind(self) -> dict[str, Drift]:
        """Of each kind of module over all layers."""
        return self._by(lambda name: layer_and_kind(name)[1])

    def by_layer_and_kind(self) -> dict[tuple[str, str], Drift]:
        """Of each kind of module in each layer."""
        return self._by(layer_and_kind)

    def worst(self, count: int) -> list[str]:
        """The modules whose updates undo most of the whole alignment, worst first; only such as undo any of it."""
        undoing = [name for name, drift in self.modules.items() if drift.along < 0]
        return sorted(undoing, key=lambda name: self.modules[name].along)[:count]

    def _by(self, key: Callable) -> dict:
        groups: dict = {}
        for name, drift in self.modules.items():
            groups.setdefault(key(name), []).append(drift)
        return {group: total(drifts) for group, drifts in groups.items()}


def _place(layer: str) -> tuple[bool, str, int]:
    stack, _, number = layer.rpartition(".")
    return not layer, stack, int(number or 0)


def recorded_inspections(record: Mapping) -> dict[str, Inspection]:
    """The ``raw`` and the ``corrected`` state of the adapter that a record is of, measured when it was written.

    There are none where nothing could be corrected, or where an earlier version wrote the record.

    Example:
        >>> recorded_inspections({"modules": {"q_proj": {"scaling": 2.0}}})
        {}
    """
    modules = {name: module["drift"] for name, module in record["modules"].items() if "drift" in module}
    if not modules:
        return {}
    return {
        state: Inspection({name: Drift(**drifts[state]) for name, drifts in modules.items()})
        for state in ("raw", "corrected")
    }


def stored_shapes(subspace: SafetySubspace, names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """The shapes in which checkpoints store the weights of these modules, of those that a subspace has.

    Example:
        >>> from torch import nn
        >>> base, aligned = nn.Sequential(nn.Linear(8, 6)), nn.Sequential(nn.Linear(8, 6))
        >>> stored_shapes(SafetySubspace.estimate(base, aligned, progress=False), ["0", "1"])
        {'0': (6, 8)}
    """
    return {name: (len(subspace[name].U), len(subspace[name].V)) for name in names if name in subspace}


def inspect_adapter(
    adapter: SavedAdapter,
    states: Mapping[str, Factors],
    subspace: SafetySubspace,
    pair: CheckpointPair | None = None,
) -> dict[str, Inspection]:
    """The drift of each of several states of one adapter, such as raw and corrected.

    Args:
        adapter: any of the states, for the scalings that they share.
        states: the factors of the same modules, by the state's name.
        subspace: must hold a basis for every one of them.
        pair: the checkpoints that the subspace is of. With them ``⟨Δ, D⟩`` is that of the whole displacement, one pair
            of weights in memory at a time; without, it is that of the part that the subspace keeps.

    Raises:
        ValueError: if factors hold NaN or Inf, the subspace lacks a module or holds one of another shape, or a weight
            cannot be read.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from peft import LoraConfig, get_peft_model
        >>> from torch import nn
        >>> base, aligned = nn.Sequential(nn.Linear(8, 6)), nn.Sequential(nn.Linear(8, 6))
        >>> subspace = SafetySubspace.estimate(base, aligned, rank=2, progress=False)
        >>> folder = Path(tempfile.mkdtemp())
        >>> get_peft_model(aligned, LoraConfig(r=2, target_modules=["0"])).save_pretrained(folder)
        >>> adapter = SavedAdapter.read(folder)
        >>> inspect_adapter(adapter, {"raw": adapter.factors}, subspace)["raw"].together.undone  # B begins as 0
        0.0
    """
    for state, factors in states.items():
        if not all_finite(factors):
            raise ValueError(
                f"`adapter`: expected finite factors, but the {state} ones in {adapter.folder} hold NaN or Inf."
            )
    stored = stored_shapes(subspace, adapter.factors)
    measured: dict[str, dict[str, Drift]] = {state: {} for state in states}
    layers = adapter.layers(adapter.stored_transposed(stored))
    wholes = WholeModules(adapter.beside.wholes, subspace)
    for state, factors in states.items():
        measured[state] |= wholes.drifts(factors, pair)
    for name in adapter.pairs:
        layer = layers[name]
        basis = oriented_basis(subspace, name, layer)
        U, V = basis.U, basis.V
        D = None if pair is None or name not in pair.names else _displacement(pair, name, layer.stored_transposed)
        for state, factors in states.items():
            A, B = factors[name]
            if D is None:
                drift = measure_kept(A, B, U, V, basis, layer.scaling)
            else:
                along = along_displacement(A, B, D, layer.scaling)
                drift = measure(A, B, U, V, along, basis.displacement**2, layer.scaling)
            measured[state][name] = drift
    return {state: Inspection(modules) for state, modules in measured.items()}


def _displacement(pair: CheckpointPair, name: str, stored_transposed: bool) -> Tensor:
    """``D (d_out, d_in)``."""
    D = displacement(pair.weights_for(name, [name]))
    return D.T if stored_transposed else D
