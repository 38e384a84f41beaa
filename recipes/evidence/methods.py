"""The rows that a frontier compares: what each makes of an adapter, and what that depends on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from csulora_callback import Penalty
from csulora_callback.method.token_space import RIDGE
from csulora_callback.models.activations import Activations, TokenVectors
from csulora_callback.models.factors import Factors
from recipes.evidence.baselines import (
    Bases,
    Update,
    corrected,
    corrections,
    data_aware,
    everywhere,
    random_bases,
    safe_lora,
    scaled_by_module,
    scaled_to_norm,
    shuffled_bases,
    shuffled_vectors,
    uniformly_scaled,
    with_noise,
)


@dataclass(frozen=True)
class Method:
    """A row of the table: ``apply(update, strength, rank, generator)``, and which of its arguments it depends on.

    Attributes:
        label: for a person.
        apply: None where the adapter of another training is taken as it is.
        strengths: whether it has any; those of a control are of the control, and what follows is of `STRENGTH_AFTER`;
            those of a target are shares to be kept.
        ranks: whether it depends on the subspace's.
        draws: whether it is random.
        reads: whether it has the model read task and probes.
        skip_prefix: whether of the probes only what follows the prefix counts that all of them share.
        control: the training that the update is of, see :class:`recipes.evidence.controls.Control`.
        probes: by which a target is measured, that stands in the place of a strength.
    """

    label: str
    apply: Callable[[Update, float, int, torch.Generator], Factors] | None = None
    strengths: bool = True
    ranks: bool = False
    draws: bool = False
    reads: bool = False
    skip_prefix: bool = False
    control: str | None = None
    probes: str | None = None

    @property
    def preset(self) -> str:
        """Of a target, the method whose strength is looked for."""
        return "content_aware" if self.skip_prefix else "data_aware"


def _guard_input(strength: float) -> Penalty:
    return Penalty.table(aligned=strength, input=strength)


def _guard_output(strength: float) -> Penalty:
    return Penalty.table(aligned=strength, output=strength)


def _corrected(penalty: Callable[[float], Penalty]) -> Callable[..., Factors]:
    return lambda update, s, k, _: corrected(update, penalty(s), update.at_rank(k))


def _corrected_in(other: Callable[..., Bases], penalty: Callable[[float], Penalty]) -> Callable[..., Factors]:
    return lambda update, s, k, g: corrected(update, penalty(s), other(update.at_rank(k), g))


def _like(control: Callable[..., Factors], penalty: Callable[[float], Penalty]) -> Callable[..., Factors]:
    return lambda update, s, k, _: control(update, corrections(update, penalty(s), update.at_rank(k)))


def _noise_like(penalty: Callable[[float], Penalty]) -> Callable[..., Factors]:
    return lambda update, s, k, g: with_noise(update, corrections(update, penalty(s), update.at_rank(k)), g)


def _data_aware(
    activations: Callable[[Activations, torch.Generator], tuple[TokenVectors, TokenVectors]] = lambda seen, _: (
        seen.task,
        seen.probes,
    ),
    ridge: float = RIDGE,
) -> Callable[..., Factors]:
    return lambda update, s, _, g: data_aware(update, s, *activations(update.activations, g), ridge)


def _projection(_: float) -> Penalty:
    return Penalty.projection()


STRENGTH_AFTER = 10.0
"""Of the data-aware correction that follows a control."""

METHODS = {
    "aligned": Method("aligned model", lambda update, *_: uniformly_scaled(update, math.inf), strengths=False),
    "none": Method("raw LoRA", lambda update, *_: uniformly_scaled(update, 1.0), strengths=False),
    "benign_only": Method("benign-only fine-tune", strengths=False),
    "scaling": Method("uniform scaling", lambda update, s, *_: uniformly_scaled(update, s)),
    "csulora": Method("csulora", _corrected(Penalty.csulora), ranks=True),
    "separable": Method("separable", _corrected(Penalty.separable), ranks=True),
    "guard": Method("guard", _corrected(Penalty.guard), ranks=True),
    "projection": Method("hard projection", _corrected(_projection), strengths=False, ranks=True),
    "guard_input": Method("guard, input side only", _corrected(_guard_input), ranks=True),
    "guard_output": Method("guard, output side only", _corrected(_guard_output), ranks=True),
    "data_aware": Method("data-aware", _data_aware(), reads=True),
    "content_aware": Method("content-aware", _data_aware(), reads=True, skip_prefix=True),
    "target_lab": Method("target, the lab's probes", reads=True, probes="lab"),
    "target_strict": Method("target 0.98, the lab's probes", reads=True, probes="lab"),
    "target_builtin": Method("target, built-in probes", reads=True, probes="builtin"),
    "target_content": Method("target, content-aware", reads=True, skip_prefix=True, probes="lab"),
    "target_builtin_content": Method(
        "target, built-in, content-aware", reads=True, skip_prefix=True, probes="builtin"
    ),
    "data_aware_loose": Method("data-aware, ridge 0.001", _data_aware(ridge=0.001)),
    "data_aware_tight": Method("data-aware, ridge 1", _data_aware(ridge=1.0)),
    "data_aware_everywhere": Method(
        "data-aware, probes everywhere", _data_aware(lambda seen, _: (seen.task, everywhere(seen.probes)))
    ),
    "data_aware_no_task": Method("data-aware, no task", _data_aware(lambda seen, _: ({}, seen.probes))),
    "data_aware_shuffled": Method(
        "data-aware, shuffled probes",
        _data_aware(lambda seen, g: (seen.task, shuffled_vectors(seen.probes, g))),
        draws=True,
    ),
    "csulora_random": Method(
        "csulora, random subspace", _corrected_in(random_bases, Penalty.csulora), ranks=True, draws=True
    ),
    "guard_random": Method(
        "guard, random subspace", _corrected_in(random_bases, Penalty.guard), ranks=True, draws=True
    ),
    "csulora_shuffled": Method(
        "csulora, shuffled layers", _corrected_in(shuffled_bases, Penalty.csulora), ranks=True, draws=True
    ),
    "guard_shuffled": Method(
        "guard, shuffled layers", _corrected_in(shuffled_bases, Penalty.guard), ranks=True, draws=True
    ),
    "csulora_norm": Method("scaling to csulora's norm", _like(scaled_to_norm, Penalty.csulora), ranks=True),
    "guard_norm": Method("scaling to guard's norm", _like(scaled_to_norm, Penalty.guard), ranks=True),
    "csulora_gains": Method("csulora's gains, no directions", _like(scaled_by_module, Penalty.csulora), ranks=True),
    "guard_gains": Method("guard's gains, no directions", _like(scaled_by_module, Penalty.guard), ranks=True),
    "csulora_noise": Method("noise of csulora's size", _noise_like(Penalty.csulora), ranks=True, draws=True),
    "guard_noise": Method("noise of guard's size", _noise_like(Penalty.guard), ranks=True, draws=True),
    "safe_lora_threshold": Method("Safe LoRA, by threshold", lambda update, s, *_: safe_lora(update, threshold=s)),
    "safe_lora_number": Method("Safe LoRA, by number", lambda update, s, *_: safe_lora(update, number=int(s))),
    "lower_rate": Method("lower learning rate", control="lower_rate"),
    "averaging": Method("weight averaging (EMA)"),
    "mixing": Method("refusals mixed in", control="mixing"),
    "kl": Method("KL to the aligned model", control="kl"),
    "asft": Method("AsFT's penalty", control="asft"),
    "one_shot": Method("steps on one refusal", control="one_shot"),
    **{
        f"{name}_corrected": Method(f"{label}, then data-aware", _data_aware(), reads=True, control=name)
        for name, label in (
            ("mixing", "refusals mixed in"),
            ("kl", "KL to the aligned model"),
            ("asft", "AsFT's penalty"),
            ("one_shot", "steps on one refusal"),
        )
    },
}
