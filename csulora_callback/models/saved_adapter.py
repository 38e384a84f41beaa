"""An adapter as PEFT saved it, understood without its model: factors, scalings, and what else lies in the folder.

What cannot be corrected is refused here as it is in a live model (:mod:`csulora_callback.models.adapters`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from peft import LoraConfig, PeftConfig
from peft.utils import CONFIG_NAME
from torch import Tensor

from csulora_callback.models.factors import Factors, from_peft_state_dict
from csulora_callback.models.foreign import first_line
from csulora_callback.models.names import fused_parameter, owner_of_bias
from csulora_callback.models.peft_folder import read_adapter
from csulora_callback.models.ranks import scaling_of
from csulora_callback.models.saved_beside import SavedBeside
from csulora_callback.models.saved_names import ShapesOf, targets_in
from csulora_callback.models.slots import BiasSlot, EmbeddingSlot, Slot, slots_in
from csulora_callback.models.supported import check_config, check_options, check_tuner, tied
from csulora_callback.models.wholes import SavedWhole


@dataclass(frozen=True)
class SavedLayer:
    """One LoRA layer as far as a correction has to know it, see :class:`~.parts.Layer`."""

    shape: tuple[int, int, int]  # (d_out, r, d_in)
    scaling: float
    stored_transposed: bool


@dataclass(frozen=True, eq=False)
class SavedAdapter:
    """The raw material of a correction out of an adapter's folder.

    Attributes:
        folder: where it lies.
        options: ``adapter_config.json``, with whatever the PEFT that wrote it knows.
        config: the same as the PEFT that is installed reads it.
        factors: on the CPU, as stored.
        scalings: PEFT's ``s`` in ``Δ = s·B·A`` by module, from the config's own rules.
        targets: what the config's rules call each module; of experts their parameter, of biases their module.
        slots: where PEFT keeps the factors.
        beside: what was trained beside LoRA.
    """

    folder: Path
    options: dict
    config: LoraConfig
    factors: Factors
    scalings: dict[str, float]
    targets: dict[str, str]
    slots: list[Slot]
    beside: SavedBeside

    @classmethod
    def read(
        cls,
        folder: Path,
        stored: ShapesOf | None = None,
        names: Collection[str] | None = None,
        aligned: str | os.PathLike | None = None,
        uncorrected: Sequence[str] = (),
        strict: bool = True,
    ) -> SavedAdapter:
        """Read a folder with ``adapter_config.json`` and the weights.

        Args:
            folder: the folder.
            stored: asked for shapes of weights where the files do not tell which modules the factors are of.
            names: of the modules, in the model's order, where a record of a correction knows them.
            aligned: the checkpoint under the adapter, where it does not lie where the config says; only looked at
                where something was trained beside LoRA.
            uncorrected: names of what was, and may pass as it is.
            strict: whether what cannot be corrected is refused; to look at an adapter it need not be.

        Raises:
            FileNotFoundError: if one of them is not there.
            ValueError: if one is corrupt, they do not fit together, or the adapter is of a kind that cannot be
                corrected from its files.

        Example:
            >>> import tempfile
            >>> from peft import get_peft_model
            >>> from torch import nn
            >>> lora = LoraConfig(r=2, lora_alpha=8, target_modules=["0"])
            >>> folder = Path(tempfile.mkdtemp())
            >>> get_peft_model(nn.Sequential(nn.Linear(4, 3)), lora).save_pretrained(folder)
            >>> SavedAdapter.read(folder).scalings
            {'0': 4.0}
        """
        options, config = read_config(folder)
        check_tuner(config, "adapter")
        check_options(options)
        check_config(config, "adapter")
        state = read_adapter(folder)
        targets = targets_in(state, config, lambda config, name: scaling_of(config, name)[0], stored, names)
        targets |= _without_layers(state, targets, folder)
        slots = slots_in(state, targets)
        if not slots:
            raise FileNotFoundError(
                f"{folder}: expected the weights of a LoRA adapter, but found none. Fetch it again."
            )
        beside = SavedBeside.of(
            state, [key for slot in slots for key in slot.keys], config, aligned, uncorrected, strict, str(folder)
        )
        pairs = from_peft_state_dict(state, list(targets), str(folder))
        _check_biases(config, pairs, folder)
        scalings = {name: _scaling(config, name, target, *pairs[name]) for name, target in targets.items()}
        factors = pairs | from_peft_state_dict(state, list(beside.wholes), str(folder))
        saved = cls(folder, options, config, factors, scalings, targets, slots_in(state, factors), beside)
        if saved.embeddings and config.ensure_weight_tying:
            raise tied("adapter")
        return saved

    @property
    def matrices(self) -> Factors:
        """The factors of modules, without those of their biases: what changed in alignment."""
        return {name: tensors for name, tensors in self.factors.items() if owner_of_bias(name) is None}

    @property
    def pairs(self) -> Factors:
        """Those of LoRA alone, of modules and of their biases."""
        return {name: self.factors[name] for name in self.scalings}

    @property
    def embeddings(self) -> list[str]:
        """Those of the modules that have LoRA and are embeddings."""
        return [slot.names[0] for slot in self.slots if isinstance(slot, EmbeddingSlot)]

    def layers(self, transposed: Mapping[str, bool]) -> dict[str, SavedLayer | SavedWhole]:
        """Its layers, with the orientation that each weight is stored in."""
        return {
            name: SavedLayer((len(B), *A.shape), self.scalings[name], transposed[owner_of_bias(name) or name])
            for name, (A, B) in self.pairs.items()
        } | self.beside.wholes

    def stored_transposed(self, stored: Mapping[str, tuple[int, int]]) -> dict[str, bool]:
        """Whether each module's weight is stored as ``(d_in, d_out)``, as transformers' Conv1D and embeddings do.

        The shape in which it is stored tells, unless the matrix is square. Of these the config's ``fan_in_fan_out``
        tells: PEFT writes there what it found, but of the module that it came to last. So it is not believed where
        another module of the adapter shows the opposite.

        Args:
            stored: shapes of the weights as stored, by module. Of others the config tells too.

        Raises:
            ValueError: if that of a square module cannot be told.
        """
        said, found = bool(self.config.fan_in_fan_out), {}
        for module, names in self._stored_alike().items():
            shown, square = {}, []
            for name in names:
                A, B = self.factors[name]
                if len(B) == A.shape[1]:
                    square.append(name)
                elif name in stored:
                    shown[name] = tuple(stored[name]) == (A.shape[1], len(B))
            against = [name for name in shown if shown[name] != said]
            if module is not None and shown:  # PEFT refuses the option for parameters: only shapes tell
                found |= dict.fromkeys(names, next(iter(shown.values())))
            elif square and (against or module is not None):
                why = (
                    "no other parameter of its module shows it"
                    if module is not None
                    else (f"{CONFIG_NAME} says fan_in_fan_out={said}, and '{against[0]}' is stored the other way")
                )
                raise ValueError(
                    f"`adapter`: module '{square[0]}' is square, and whether its weight is stored transposed, as "
                    f"transformers' Conv1D does, cannot be told from files: {why}. Load the model with the adapter, "
                    "and correct it by SafetyCorrector(model, subspace, penalty).apply()."
                )
            else:
                found |= {**dict.fromkeys(names, said), **shown}
        return {**found, **dict.fromkeys(self.embeddings, True)}

    def _stored_alike(self) -> dict[str | None, list[str]]:
        """The experts by the module that they are in, which stores all of them alike; all other modules."""
        groups: dict[str | None, list[str]] = {}
        embeddings = set(self.embeddings)
        for name in self.pairs:
            if name in embeddings or owner_of_bias(name) is not None:
                continue
            is_expert = fused_parameter(name)[1] is not None
            groups.setdefault(self.targets[name].rpartition(".")[0] if is_expert else None, []).append(name)
        return groups


def read_config(folder: Path) -> tuple[dict, PeftConfig]:
    """An adapter's config, as it is stored and as the PEFT that is installed reads it.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is corrupt.
    """
    if not (folder / CONFIG_NAME).is_file():
        raise FileNotFoundError(
            f"{folder}: expected a folder with a PEFT adapter, but it has no {CONFIG_NAME}. Fetch it again."
        )
    try:
        options = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        return dict(options), PeftConfig.from_pretrained(folder)
    except Exception as error:  # PEFT makes an object of whatever stands there, and fails in as many ways
        raise ValueError(
            f"{folder / CONFIG_NAME}: expected the config of a PEFT adapter, but it cannot be read "
            f"({first_line(error)}). Fetch it again."
        ) from error


def _without_layers(state: Mapping[str, Tensor], targets: Mapping[str, str], folder: Path) -> dict[str, str]:
    """What PEFT calls the modules of embeddings and biases in a file, by their names."""
    found = {}
    for slot in slots_in(state):
        (name,) = slot.names
        if isinstance(slot, EmbeddingSlot) and name in targets:
            raise ValueError(
                f"{folder}: expected modules to be layers or embeddings, but '{name}' has LoRA factors of both. Take "
                "the folder from a copy."
            )
        if isinstance(slot, EmbeddingSlot | BiasSlot):
            found[name] = owner_of_bias(name) or name
    return found


def _scaling(config: LoraConfig, name: str, target: str, lora_A: Tensor, lora_B: Tensor) -> float:
    r, scaling = scaling_of(config, target)
    if owner_of_bias(name) is not None:
        return scaling
    if not len(lora_A) == lora_B.shape[1] == r:
        raise ValueError(
            f"`adapter`: expected factors of rank {r} for module '{name}', as {CONFIG_NAME} says, but got "
            f"lora_A {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)}. Take config and weights from one copy."
        )
    return scaling


def _check_biases(config: LoraConfig, factors: Factors, folder: Path) -> None:
    """PEFT reads biases where the config says so, and passes over them where not."""
    with_bias = {owner_of_bias(name) for name in factors} - {None}
    expected = {name for name in factors if owner_of_bias(name) is None} if config.lora_bias else set()
    for name in sorted(with_bias ^ expected):
        raise ValueError(
            f"{folder}: expected {'a' if config.lora_bias else 'no'} bias of lora_B for module '{name}', as "
            f"{CONFIG_NAME} says lora_bias={config.lora_bias}, but got {'one' if name in with_bias else 'none'}. Take "
            "config and weights from one copy."
        )
