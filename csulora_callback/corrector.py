"""One model, one subspace, one penalty: measure, correct around a block of code, or correct for good."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from csulora_callback.corrected import CorrectedAdapter
from csulora_callback.correcting import Correcting
from csulora_callback.inspection import Inspection
from csulora_callback.method.gauge import CorrectionOverflowError
from csulora_callback.method.penalty import Penalty
from csulora_callback.method.token_space import InputGain
from csulora_callback.models import sharding
from csulora_callback.models.activations import Activations, Texts
from csulora_callback.models.adapters import Adapter, find_adapter
from csulora_callback.models.factors import Factors, all_finite, cast_alike, digest, equal, is_cast
from csulora_callback.models.processes import Processes
from csulora_callback.subspace import SafetySubspace
from csulora_callback.swap import LOCK, Swap, Swaps

logger = logging.getLogger(__name__)
Model = nn.Module | Adapter


class SafetyCorrector:
    """Corrects the LoRA adapter of a live model.

    Args:
        model: one with an active LoRA adapter, or what :func:`~.models.adapters.find_adapter` found in it.
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
        >>> before = corrector.adapter.read()
        >>> with corrector.corrected() as adapter:  # corrected factors are live in here, the raw ones after
        ...     inside = adapter.metrics["csulora/attenuation"]
        >>> equal(corrector.adapter.read(), before) and 0 < inside < 1
        True
    """

    def __init__(
        self, model: Model, subspace: SafetySubspace, penalty: Penalty, activations: Activations | None = None
    ) -> None:
        if penalty.on_probes is not None and activations is None:
            raise ValueError(f"`activations`: expected those of the model for the penalty {penalty}, but got none.")
        self.adapter = model if isinstance(model, Adapter) else find_adapter(model)
        self.subspace = subspace
        self._activations = activations
        self._input_gains: dict[str, InputGain] | None = None
        self.notes: dict[str, object] = {}  # what else records say, from now on
        own, kept = self.adapter, {"notes": self.notes, "passing": self.adapter.passing}
        self._correcting = Correcting(own.name, own.layers, subspace, penalty, **kept)
        self.passing = self._correcting.passing  # what is trained and not corrected, by name, and why
        self._last: CorrectedAdapter | None = None  # the last correction that was computed
        self._swap: Swap | None = None  # the last one that stood in the model, for an evaluation's many batches
        self._swaps = Swaps(self.adapter)
        self._applied: CorrectedAdapter | None = None  # the last correction made for good
        self._warned = False

    @property
    def activations(self) -> Activations | None:
        """What a data-aware penalty measures by; may be set to newer ones."""
        return self._activations

    @activations.setter
    def activations(self, activations: Activations) -> None:
        self._activations, self._input_gains, self._last = activations, None, None

    @property
    def penalty(self) -> Penalty:
        """The table of multipliers; :meth:`penalize` gives another one."""
        return self._correcting.penalty

    @property
    def chosen(self) -> Mapping[str, float] | None:
        """How its strength was found, if it was looked for."""
        return self._correcting.chosen

    def penalize(self, penalty: Penalty, chosen: Mapping[str, float] | None = None) -> None:
        """Correct with another penalty from now on; ``chosen`` says in records how its strength was found."""
        self._correcting.penalty, self._correcting.chosen = penalty, chosen
        self._input_gains = self._last = self._swap = None

    @contextmanager
    def trying(self, penalty: Penalty) -> Iterator[CorrectedAdapter]:
        """As :meth:`corrected`, by another penalty; nothing is said where it cannot be made."""
        self.penalize(penalty)
        warned, self._warned = self._warned, True
        try:
            with self.corrected() as adapter:
                yield adapter
        finally:
            self._warned = warned

    @property
    def _texts(self) -> Texts | None:
        return None if self._activations is None else self._activations.texts

    def known(self, factors: Factors) -> CorrectedAdapter | None:
        """The correction that these factors are the result of, also after a cast; ``None`` where they are raw."""
        for known in (*self._swaps.inside, self._applied):
            if known is not None and is_cast(factors, known.corrected):
                return known.held_as(factors)
        return None

    def is_live(self) -> bool:
        """Whether the live factors are the result of a correction. Collective where they are sharded."""
        return self.known(self.adapter.read()) is not None

    def compute(self, factors: Factors | None = None) -> CorrectedAdapter:
        """The correction of the adapter as it stands, or of ``factors`` taken from it, without touching the model.

        Where they are the result of a correction already, that correction is returned: none is ever applied twice to
        the same weights.
        """
        factors = self.adapter.read() if factors is None else factors
        with LOCK:  # another thread may be looking for a strength, by trying some
            return self.known(factors) or self._compute(factors)

    def _compute(self, raw: Factors) -> CorrectedAdapter:
        if (last := self._if_last(raw)) is not None:
            return last
        if not all_finite(raw) or not (self._activations is None or self._activations.finite):
            return self._left_raw(raw, "the factors, or activations with them, hold NaN or Inf")
        try:
            self._last = self._correcting.correct(raw, self._gains(raw), self._texts)
        except CorrectionOverflowError as error:
            return self._left_raw(raw, str(error))
        return self._last

    def _if_last(self, raw: Factors) -> CorrectedAdapter | None:
        return self._last if self._last is not None and equal(raw, self._last.raw) else None

    def taken(
        self, state_dict: Callable[[], Mapping[str, Tensor]], module: nn.Module
    ) -> tuple[dict[str, Tensor], Factors | None]:
        """A state dict of ``module``, and copies of the factors in it, taken while none of them come or go.

        ``None`` where it does not hold them all.
        """
        with LOCK:
            state = dict(state_dict())
            factors = self.adapter.factors_in(state, module)
            return state, None if factors is None else {n: tuple(sharding.gather(pair)) for n, pair in factors.items()}

    def inside(self) -> CorrectedAdapter | None:
        """The correction that stands in the model at the moment, within :meth:`corrected`."""
        return self._swaps.inside[-1] if self._swaps.inside else None

    def measure(self) -> dict[str, float]:
        """The metrics of the correction as it would be made now, see :meth:`~.correcting.Correcting.measure`."""
        raw = self.adapter.read()
        with LOCK:
            done = self.known(raw) or self._if_last(raw)
            if done is None and (self._activations is None or self._activations.finite):
                metrics = self._correcting.measure(raw, self._gains(raw))
                return self._compute(raw).metrics if metrics is None else metrics
            return (done or self._compute(raw)).metrics

    def inspect(self, adapter: CorrectedAdapter) -> dict[str, Inspection]:
        """The ``raw`` and the ``corrected`` state of one of its corrections, module by module.

        There are none where nothing could be corrected.
        """
        states = {"raw": adapter.raw, "corrected": adapter.corrected} if adapter.metrics else {}
        return self._correcting.inspect(states)

    def apply(self) -> CorrectedAdapter:
        """Correct the live factors in place, for good. Doing so again without training in between changes nothing."""
        live = self.adapter.read()
        known = self.known(live)
        if known is not None:
            return known
        adapter = self._compute(live)
        self.adapter.write_trained(adapter.corrected)
        self._applied, self._last, self._swap = adapter, None, None
        return adapter

    def step(self) -> CorrectedAdapter:
        """Correct the live factors in place as a step of training: what comes out is what training goes on from.

        A checkpoint saved right after it therefore records the corrected factors as the raw ones.
        """
        adapter = self.compute(self.adapter.read_trained())
        self.adapter.write_trained(adapter.corrected)
        live = self.adapter.read()  # may be of a narrower dtype than what is trained
        record = {**adapter.record, "raw_digest": digest(live), "corrected_digest": digest(live)}
        self._applied = CorrectedAdapter(live, live, adapter.metrics, lambda: record, adapter.texts)
        return self._applied

    def mark_applied(self, adapter: CorrectedAdapter) -> None:
        """Tell the corrector that the live factors are the corrected ones of ``adapter``, loaded from a checkpoint."""
        self._applied = adapter

    @contextmanager
    def corrected(self) -> Iterator[CorrectedAdapter]:
        """The correction of the live factors is live inside, and what was there before after it, whatever happens.

        A factor that someone else writes inside is left as he wrote it. Where the live factors are corrected already,
        nothing is written. After an exception sharded factors stay as they are: this may be the only process that
        raised, and putting them back would wait for the others.
        """
        swap = self._swap_for_live()
        try:
            self._swaps.begin(swap)
            yield swap.adapter
        except BaseException:
            if not self.adapter.is_sharded:
                self._swaps.end(swap)
            raise
        self._swaps.end(swap)

    @contextmanager
    def lifted(self, for_good: bool = False) -> Iterator[None]:
        """What stands under a correction is live inside, and the correction of what it became there after.

        For those who change weights relative to what they are: an optimizer that goes from the weights that it trains
        to their average and back would otherwise do so from corrected ones.

        Args:
            for_good: whether it is the correction that :meth:`apply` made, and not one of :meth:`corrected`.
        """
        with LOCK:
            swap = self._swaps.innermost()
            if swap is not None:
                self._swaps.lift(swap)
                try:
                    yield
                finally:
                    self._swaps.lower(swap, self._swap_for_live())
            elif for_good and self.is_live():
                live, applied = self.adapter.read(), self._applied
                self.adapter.write(cast_alike(live, applied.corrected, applied.raw) or applied.raw)
                try:
                    yield
                finally:
                    self.apply()
            else:
                yield

    @contextmanager
    def holding(self, factors: Factors) -> Iterator[None]:
        """Other factors are live inside, and what was there before after it. Collective where they are sharded."""
        with LOCK:
            before = [tensor.clone() for tensor in self.adapter.held()]
            self.adapter.hold(self.adapter.as_held(factors))
            try:
                yield
            finally:
                self.adapter.hold(before)

    def _swap_for_live(self) -> Swap:
        with LOCK:
            before = self.adapter.held()
            fits = self._swap is not None and self._swap.fits(before, self._activations)
            if all(Processes.all().gather(fits)) if self.adapter.is_sharded else fits:
                return Swap(self._swap.adapter, self._swap.before, self._swap.put, self._activations)
            before = [tensor.clone() for tensor in before]
            live = self.adapter.whole(before)
            known = self.known(live)
            adapter = known or self._compute(live)
            if known is not None or adapter.corrected is adapter.raw:
                return Swap(adapter, before, [])
            self._swap = Swap(adapter, before, self.adapter.as_held(adapter.corrected), self._activations)
            return Swap(adapter, before, self._swap.put, self._activations)

    def _left_raw(self, raw: Factors, reason: str) -> CorrectedAdapter:
        """What is saved where nothing can be corrected: training is not stopped for it, and the record says so."""
        if not self._warned:
            self._warned = True
            logger.warning(
                "What is saved now is the raw adapter, not a corrected one, and its record says so: %s.", reason
            )
        return self._correcting.left_raw(raw, reason, self._texts)

    def _gains(self, raw: Factors) -> dict[str, InputGain] | None:
        if self._input_gains is None:
            self._input_gains = self._correcting.gains(self._activations, next(iter(raw.values()))[0].device)
        return self._input_gains
