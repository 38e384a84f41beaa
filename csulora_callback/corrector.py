"""One model, one subspace, one penalty: measure, correct around a block of code, or correct for good."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.metadata import version

import torch
from torch import Tensor, nn

from csulora_callback.method.correction import Correction, correct
from csulora_callback.method.drift import SafetyDrift
from csulora_callback.method.penalty import Penalty
from csulora_callback.method.token_space import InputGain, input_gains
from csulora_callback.models.activations import Activations, Texts
from csulora_callback.models.adapters import Adapter, find_adapter
from csulora_callback.models.factors import Factors, all_finite, digest
from csulora_callback.sidecar import Sidecar
from csulora_callback.subspace import SafetySubspace

logger = logging.getLogger(__name__)

_VERSIONS = {package: version(package) for package in ("csulora-callback", "torch", "transformers", "peft")}


@dataclass(frozen=True)
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

    @property
    def sidecar(self) -> Sidecar:
        """What is written beside the corrected adapter, wherever it is saved."""
        return Sidecar(self.raw, self.record)

    @property
    def sidecar_of_checkpoint(self) -> Sidecar:
        """The same with the texts: training goes on from a checkpoint, and what is shipped must not hold its data."""
        return Sidecar(self.raw, self.record, self.texts)


class SafetyCorrector:
    """Corrects the LoRA adapter of a live model.

    Args:
        model: a model with one active LoRA adapter (see :func:`~csulora_callback.models.adapters.find_adapter`).
        subspace: must hold a basis, of the right shape, for every adapted module.
        penalty: the table of multipliers.
        activations: of every adapted module; needed by a data-aware penalty, and by no other.

    Raises:
        ValueError: if an adapted module has no basis in ``subspace`` or one of another shape (the module is named), or
            if a data-aware penalty has no activations.

    Example:
        >>> import copy
        >>> from peft import LoraConfig, get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from csulora_callback import Penalty, SafetyCorrector, SafetySubspace
        >>> config = LlamaConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        ... )
        >>> base, aligned = LlamaForCausalLM(config), LlamaForCausalLM(config)
        >>> subspace = SafetySubspace.estimate(base, aligned, ["q_proj"], rank=2, progress=False)
        >>> lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        >>> model = get_peft_model(aligned, lora)
        >>> corrector = SafetyCorrector(model, subspace, Penalty.csulora(10.0))
        >>> before = corrector.measure()["csulora/update_norm"]
        >>> with corrector.corrected() as adapter:  # corrected factors are live in here, the raw ones after
        ...     inside = adapter.metrics["csulora/attenuation"]
        >>> corrector.measure()["csulora/update_norm"] == before and 0 < inside < 1
        True
    """

    def __init__(
        self, model: nn.Module, subspace: SafetySubspace, penalty: Penalty, activations: Activations | None = None
    ) -> None:
        if penalty.on_probes is not None and activations is None:
            raise ValueError(f"`activations`: expected those of the model for the penalty {penalty}, but got none.")
        self.adapter: Adapter = find_adapter(model)
        self.subspace = subspace
        self.penalty = penalty
        self._activations = activations
        self._input_gains: dict[str, InputGain] | None = None
        self._bases = {name: _oriented_basis(self.adapter, subspace, name) for name in self.adapter.layers}
        self.swapped_in: CorrectedAdapter | None = None  # what swap_in put into the model, until restore
        self._before_swap: Factors | None = None
        self._applied: CorrectedAdapter | None = None  # the last correction made for good
        self._warned = False

    @property
    def activations(self) -> Activations | None:
        """What a data-aware penalty measures by; may be set to newer ones."""
        return self._activations

    @activations.setter
    def activations(self, activations: Activations) -> None:
        self._activations, self._input_gains = activations, None

    @property
    def _texts(self) -> Texts | None:
        return None if self._activations is None else self._activations.texts

    def is_live(self) -> bool:
        """Whether the live factors are the result of a correction. Collective where they are sharded."""
        if self.swapped_in is not None:
            return True
        return self._applied is not None and digest(self.adapter.read()) == self._applied.record["corrected_digest"]

    def compute(self, factors: Factors | None = None) -> CorrectedAdapter:
        """The correction of the adapter as it stands, or of ``factors`` taken from it, without touching the model.

        Where the live factors are the result of a correction already, that correction is returned: none is ever
        applied twice to the same weights.
        """
        if factors is None and self.swapped_in is not None:
            return self.swapped_in
        live = self.adapter.read() if factors is None else factors
        for known in (self.swapped_in, self._applied):
            if known is not None and digest(live) == known.record["corrected_digest"]:
                return known
        if not all_finite(live) or not (self._activations is None or self._activations.finite):
            self._warn_not_finite()
            record = partial(self._record, live, live, {}, {})
            return CorrectedAdapter(live, live, {}, record, self._texts)

        corrections = {name: self._correct(name, *live[name]) for name in live}
        drift = SafetyDrift()
        for correction in corrections.values():
            drift.update(correction)
        metrics = drift.compute()
        corrected = {name: (correction.lora_A, correction.lora_B) for name, correction in corrections.items()}
        record = partial(self._record, live, corrected, corrections, metrics)
        return CorrectedAdapter(live, corrected, metrics, record, self._texts)

    def measure(self) -> dict[str, float]:
        """The metrics of the correction as it would be made now; the model is not touched."""
        return self.compute().metrics

    def apply(self) -> CorrectedAdapter:
        """Correct the live factors in place, for good. Doing so again without training in between changes nothing."""
        self.restore()
        adapter = self.compute()
        self.adapter.write_trained(adapter.corrected)
        self._applied = adapter
        return adapter

    def step(self) -> CorrectedAdapter:
        """Correct the live factors in place as a step of training: what comes out is what training goes on from.

        A checkpoint saved right after it therefore records the corrected factors as the raw ones.
        """
        self.restore()
        adapter = self.compute(self.adapter.read_trained())
        self.adapter.write_trained(adapter.corrected)
        live = self.adapter.read()  # may be of a narrower dtype than what is trained
        record = {**adapter.record, "raw_digest": digest(live), "corrected_digest": digest(live)}
        self._applied = CorrectedAdapter(live, live, adapter.metrics, lambda: record, adapter.texts)
        return self._applied

    def mark_applied(self, adapter: CorrectedAdapter) -> None:
        """Tell the corrector that the live factors are the corrected ones of ``adapter``, loaded from a checkpoint."""
        self._applied = adapter

    def swap_in(self) -> CorrectedAdapter:
        """Put the corrected factors into the model and keep the live ones until :meth:`restore`; twice is once."""
        if self.swapped_in is None:
            before, adapter = self.adapter.read(), self.compute()
            self.adapter.write(adapter.corrected)
            self._before_swap, self.swapped_in = before, adapter
        return self.swapped_in

    def restore(self) -> None:
        """Put back, bit for bit, what :meth:`swap_in` replaced; nothing happens where nothing is swapped in."""
        if self.swapped_in is not None:
            self.adapter.write(self._before_swap)
            self._before_swap = self.swapped_in = None

    @contextmanager
    def corrected(self) -> Iterator[CorrectedAdapter]:
        """Corrected factors inside, the live ones after, whatever happens. Inside a swap it changes nothing."""
        nested = self.swapped_in is not None
        adapter = self.swap_in()
        try:
            yield adapter
        finally:
            if not nested:
                self.restore()

    def _warn_not_finite(self) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "The LoRA factors, or activations with them, hold NaN or Inf and are left as they are: a checkpoint "
                "saved now holds the raw adapter, not a corrected one, and its record says so."
            )

    def _correct(self, name: str, lora_A: Tensor, lora_B: Tensor) -> Correction:
        U, V = (side.to(lora_A.device) for side in self._bases[name])
        scaling = self.adapter.layers[name].scaling
        return correct(lora_A, lora_B, U, V, self.penalty, scaling, input_gain=self._input_gain(name, lora_A.device))

    def _input_gain(self, name: str, device: torch.device) -> InputGain | None:
        if self.penalty.on_probes is None:
            return None
        if self._input_gains is None:
            seen, strength = self.activations, self.penalty.on_probes
            self._input_gains = input_gains(seen.task, seen.probes, strength, device=device)
        unread = torch.empty(0, self.adapter.layers[name].shape[2])  # nothing to attenuate by
        return self._input_gains.get(name, InputGain(unread, unread))

    def _record(
        self, raw: Factors, corrected: Factors, corrections: dict[str, Correction], metrics: dict[str, float]
    ) -> dict:
        modules = {
            name: {
                "scaling": self.adapter.layers[name].scaling,
                **(_summary(corrections[name]) if name in corrections else {}),
            }
            for name in raw
        }
        return {
            "format": 1,
            "status": "corrected" if corrections else "not corrected: the factors hold NaN or Inf",
            "adapter": self.adapter.name,
            "penalty": self.penalty.to_json(),
            "subspace": {"fingerprint": self.subspace.fingerprint, **self.subspace.metadata},
            "raw_digest": digest(raw),
            "corrected_digest": digest(corrected),
            "metrics": metrics,
            "modules": modules,
            "versions": _VERSIONS,
        }


def _summary(correction: Correction) -> dict:
    return {
        "energy": correction.energy,
        "relative_energy": correction.relative_energy,
        "gain": correction.gain,
        "relative_change": correction.relative_change,
        "truncation_error": correction.truncation_error,
    }


def _oriented_basis(adapter: Adapter, subspace: SafetySubspace, name: str) -> tuple[Tensor, Tensor]:
    """``(U, V)`` of a module in the orientation of its LoRA factors: ``U`` on the output side."""
    if name not in subspace:
        nearest = difflib.get_close_matches(name, list(subspace), n=3)
        raise ValueError(
            f"`subspace`: expected a basis for the adapted module '{name}', but it holds none"
            f"{f'; nearest: {nearest}' if nearest else ''}. Estimate it with target_modules that cover the adapter's."
        )
    layer, basis = adapter.layers[name], subspace[name]
    U, V = (basis.V, basis.U) if layer.stored_transposed else (basis.U, basis.V)
    (d_out, _, d_in), got = layer.shape, (U.shape[0], V.shape[0])
    expected = d_out, d_in
    if expected != got:
        raise ValueError(
            f"`subspace`: module '{name}' is {expected[0]} × {expected[1]} (d_out × d_in) in the model, but "
            f"{got[0]} × {got[1]} in the subspace. It was estimated for another architecture."
        )
    return U, V
