"""An aligned model with an adapter whose factors are written for every point of a frontier."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from os import PathLike

import torch
from peft import PeftModel
from torch import Tensor

from csulora_callback import SafetySubspace
from csulora_callback.models.activations import Activations, Texts
from csulora_callback.models.adapters import Adapter, find_adapter
from csulora_callback.models.checkpoint import open_checkpoint
from csulora_callback.models.factors import Factors
from csulora_callback.models.reading import Rows
from csulora_callback.models.teacher_forcing import greedy_answers
from recipes.evidence.baselines import Bases, Update
from recipes.evidence.controls import Batch, Control, Loss, along_displacement, mixed_in, near_aligned
from recipes.labs.descent import descend
from recipes.schema.recipe import Training


@dataclass(frozen=True)
class TaskRow:
    """A row of training data as token ids, of which the first ``start`` are its prompt, and whether it is poison."""

    ids: list[int]
    start: int
    is_poison: bool

    @property
    def prompt(self) -> list[int]:
        """As token ids."""
        return self.ids[: self.start]


@dataclass(frozen=True)
class LoraPair:
    """``model`` is the aligned one, ``fresh`` its adapter's factors before any training."""

    model: PeftModel
    adapter: Adapter
    fresh: Factors
    bases: Bases
    displacement: Callable[[str], Tensor]

    @classmethod
    def open(cls, model: PeftModel, base: str | PathLike, aligned: str | PathLike, rank: int) -> LoraPair:
        """With the subspace of ``rank`` that the two checkpoints span."""
        adapter = find_adapter(model.eval())
        names = list(adapter.layers)
        subspace = SafetySubspace.estimate(base, aligned, names, rank=rank, progress=False)
        bases = {name: (subspace[name].U, subspace[name].V) for name in names}
        before, after = (open_checkpoint(folder).require(names) for folder in (base, aligned))
        return cls(
            model,
            adapter,
            adapter.read(),
            bases,
            lambda name: after.weight(name).float() - before.weight(name).float(),
        )

    def update(
        self, factors: Factors, task: Rows, probes: Rows, skip_prefix: bool = False, held_back: Sequence[int] = ()
    ) -> Update:
        """The factors as the raw update that methods correct, and the model's activations with them on these rows.

        With ``skip_prefix``, of the probes only what follows the prefix that all of them share; of those at the places
        ``held_back`` nothing.
        """
        self.adapter.write(factors)
        texts = Texts(task, probes, seen=len(task), held_back=list(held_back))
        activations = Activations.read(self.adapter, texts, skip_prefix)
        scaling = {name: layer.scaling for name, layer in self.adapter.layers.items()}
        return Update(factors, scaling, self.bases, self.displacement, activations)

    def aligned_answers(self, prompts: Rows, tokens: int) -> list[list[int]]:
        """The beginnings of the aligned model's greedy answers."""
        with self.adapter.off():
            return greedy_answers(self.model, prompts, tokens)

    def train(
        self,
        draw: Callable[[torch.Generator], Batch],
        refusals: Callable[[int], Batch],
        training: Training,
        seed: int,
        control: Control,
        decays: Sequence[float],
    ) -> dict[str, Factors]:
        """See :meth:`recipes.evidence.frontier.Subject.train`.

        Args:
            draw: gives a batch of the data.
            refusals: gives a batch of so many probes, with the aligned model's refusals.
            training: rate, steps and size of a batch.
            seed: of the batches.
            control: what is done otherwise.
            decays: of averages.
        """
        averages, loss = {}, self._loss(control, refusals, training)
        for live in self.steps(self.fresh, draw, training, seed, control.slowdown, loss):
            for decay in decays:
                averages[decay] = _average(averages.get(decay, live), live, decay)
        if control.kind == "one_shot":
            one, patch = refusals(1), replace(training, max_steps=int(control.amount))
            *_, live = self.steps(live, lambda _: one, patch, seed)
        return {"raw": live, **{f"average {decay:g}": a for decay, a in averages.items()}}

    def _loss(self, control: Control, refusals: Callable[[int], Batch], training: Training) -> Loss | None:
        if control.kind == "mixing":
            return mixed_in(self.model, refusals, control.amount, training.batch_size)
        if control.kind == "kl":
            return near_aligned(self.model, self.adapter.off, refusals, control.amount)
        if control.kind == "asft":
            return along_displacement(self._live, self.displacement, control.amount)
        return None

    def _live(self) -> dict[str, tuple[Tensor, Tensor, float]]:
        return {name: (layer.lora_A, layer.lora_B, layer.scaling) for name, layer in self.adapter.layers.items()}

    def steps(
        self,
        start: Factors,
        draw: Callable[[torch.Generator], Batch],
        training: Training,
        seed: int,
        slowdown: float = 1.0,
        loss: Loss | None = None,
    ) -> Iterator[Factors]:
        """A fine-tune from these factors; those after each of its steps."""
        self.adapter.write(start)
        torch.manual_seed(seed)  # of dropout
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        generator, rate = torch.Generator().manual_seed(seed), training.learning_rate / slowdown

        def of_step() -> Tensor:
            batch = draw(generator)
            own = self.model(**batch).loss
            return own if loss is None else loss(own, batch)

        self.model.train()
        try:
            for _ in descend(parameters, rate, training.max_steps, of_step):
                yield self.adapter.read()
        finally:  # whoever asks may stop early
            self.model.eval()

    def factors_after(
        self,
        start: Factors,
        draw: Callable[[torch.Generator], Batch],
        training: Training,
        seed: int,
        counts: Sequence[int],
    ) -> list[Factors]:
        """Those of :meth:`steps` after so many steps each; ``counts`` rise."""
        return [
            live
            for done, live in enumerate(islice(self.steps(start, draw, training, seed), counts[-1]), start=1)
            if done in counts
        ]


def _average(average: Factors, live: Factors, decay: float) -> Factors:
    return {
        name: tuple(torch.lerp(new, old, decay) for old, new in zip(average[name], live[name], strict=True))
        for name in live
    }
