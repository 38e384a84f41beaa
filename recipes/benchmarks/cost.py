"""What probes cost, in units of a training step: ``python -m recipes.benchmarks.cost [key=value ...]``.

First what measuring a model's behaviour by them costs, then what a data-aware penalty does.

Steps with and without the recorder take turns in one run, and medians are compared; times of their own say nothing
about another machine. The model is a Llama with random weights, as times do not depend on what it knows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from omegaconf import OmegaConf
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from csulora_callback import Penalty, SafetyCorrector, SafetySubspace
from csulora_callback.aligned_answers import ANSWER
from csulora_callback.behaviour import BEGINNING, Behaviour, Refusals
from csulora_callback.models.adapters import Adapter, find_adapter
from csulora_callback.models.processes import Processes
from csulora_callback.models.teacher_forcing import greedy_answers
from csulora_callback.models.training_rows import ROWS, fixed_sample
from csulora_callback.trainers.recorder import ActivationRecorder
from recipes.benchmarks.timing import timed


@dataclass
class Size:
    """Of the model, of a batch, and of the probes; defaults are those of SmolLM2-135M with a smaller vocabulary."""

    hidden_size: int = 576
    intermediate_size: int = 1536
    layers: int = 30
    vocabulary: int = 8192
    batch: int = 8
    length: int = 96
    probes: int = 160  # as many as are built in
    probe_length: int = 32
    lora_rank: int = 8
    steps: int = 10  # of each kind


def main(overrides: list[str] | None = None) -> dict[str, float]:
    """Measure, print a table, and return the ratios."""
    size = OmegaConf.merge(OmegaConf.structured(Size), OmegaConf.from_dotlist(overrides or []))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=size.layers,
        num_attention_heads=8,
    )
    base, aligned = LlamaForCausalLM(config), LlamaForCausalLM(config)
    names = [name for name, module in aligned.named_modules() if name.endswith("_proj")]
    subspace = SafetySubspace.estimate(base, aligned, names, rank=16, progress=False)
    del base
    lora = LoraConfig(r=size.lora_rank, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(aligned, lora).train()
    if torch.accelerator.is_available():
        model = model.to(torch.accelerator.current_accelerator())
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-5)
    ids = torch.randint(size.vocabulary, (size.batch, size.length), device=model.device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    probes = torch.randint(size.vocabulary, (size.probes, size.probe_length)).tolist()
    recorder = ActivationRecorder(find_adapter(model), probes, Processes())
    corrector = SafetyCorrector(model, subspace, Penalty.data_aware(), recorder.unread())

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def recorded() -> None:
        recorder.begin_step()
        step()
        recorder.end_step()

    plain, watched = [], []
    for i in range(size.steps + 1):
        pair = seconds(step), seconds(recorded)
        if i:  # the first ones warm up
            plain.append(pair[0])
            watched.append(pair[1])
    answered, behaviour = watched_behaviour(recorder.adapter, probes)
    prompts = [
        ids[0].tolist()[: 1 + place % (size.length - 1)] for place in range(ROWS)
    ]  # of many lengths, as rows are
    screened = seconds(lambda: greedy_answers(model, prompts, ANSWER, padding=True))
    measured = []
    for _ in range(3):
        step()  # of other weights nothing is known yet
        recorder.renew(corrector)
        corrector.measure()
        measured.append(seconds(lambda: behaviour.measure(corrector)))
    read, first, other, again = [], [], [], []
    for strength in (1.0, 3.0, 10.0):
        corrector.penalize(Penalty.data_aware(strength))
        step()
        read.append(seconds(lambda: recorder.renew(corrector)))
        first.append(seconds(corrector.measure))
        corrector.penalize(Penalty.data_aware(2.0 * strength))
        other.append(seconds(corrector.measure))
        step()
        again.append(seconds(corrector.measure))
    one = median(plain)
    ratios = {
        "a step that the callback looks at": median(watched) / one,
        "the aligned model's answers to the probes, once": answered / one,
        f"its answers to the prompts of {ROWS} sampled rows, once": screened / one,
        "behaviour, at an evaluation or save": median(measured[1:]) / one,  # at first the aligned model is read too
        "reading task and probes, before a save": median(read) / one,
        "the systems and the correction after that": median(first) / one,
        "the correction by another strength": median(other) / one,
        "the correction of other weights, as at a log": median(again) / one,
    }
    half = behaviour.refusals.of(fixed_sample(size.probes, size.probes // 2))  # a target measures by the other half
    half.read()  # at first the aligned model is read too

    def trial(strength: float) -> None:
        corrector.penalize(Penalty.data_aware(strength))
        with corrector.corrected():
            half.read()

    tried = [seconds(lambda strength=strength: trial(strength)) for strength in (1.0, 3.0, 10.0)]
    ratios["a trial of a target, of eight at most"] = median(tried) / one
    table = Table(title=f"medians, in steps of {one:.2f} s on {model.device}", title_justify="left")
    table.add_column("what")
    table.add_column("steps", justify="right")
    for what, ratio in ratios.items():
        table.add_row(what, f"{ratio:.3f}")
    spread = f"{min(plain) / one:.2f} to {max(plain) / one:.2f}"
    Console().print(table, f"Single steps without the callback took {spread} of their median.")
    return ratios


def watched_behaviour(adapter: Adapter, probes: list[list[int]]) -> tuple[float, Behaviour]:
    """How long the answers take that nothing is cached of, and what measures by them."""
    found = []
    with adapter.off():
        answered = seconds(lambda: found.extend(greedy_answers(adapter.model, probes, ANSWER)))
    return answered, Behaviour(Refusals(adapter, probes, [answer[:BEGINNING] for answer in found]))


def seconds(work: Callable[[], object]) -> float:
    """On the clock."""
    return timed(work)["seconds"]


if __name__ == "__main__":
    main(sys.argv[1:])
