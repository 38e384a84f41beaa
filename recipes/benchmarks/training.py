"""What the callback adds to a real training run: at a log, a save and an evaluation, in units of a step.

Each run of a ``transformers.Trainer`` with the callback begins with a step of full size. All other steps are of a few
tokens, as a log, a save and an evaluation cost the same after any step. Runs with and without the callback take turns.
"""

from __future__ import annotations

import io
import shutil
import time
from contextlib import redirect_stdout
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from csulora_callback import CSULoRACallback, SafetySubspace
from recipes.benchmarks.correction import with_lora
from recipes.benchmarks.timing import accelerator_peak, synchronize
from recipes.schema.measured import Benchmark

EVENTS = ("log", "save", "evaluation")
EVALUATED = 4  # batches of an evaluation
_SHORT = 8  # tokens
_STEPS = ("step", *EVENTS, "nothing")


def measure(model: nn.Module, subspace: SafetySubspace, benchmark: Benchmark, folder: Path) -> dict:
    """Seconds of a step of full size, and of what follows on others, by run, with the callback and without it.

    The first run of each kind warms up. Adapters are new in each, on the same model.
    """
    runs: dict[str, list[dict[str, float]]] = {"with": [], "without": []}
    sizes = {}
    accelerator_peak()  # from here on
    for turn in range(benchmark.repeats + 1):
        for kind, found in runs.items():
            callbacks = [CSULoRACallback(subspace=subspace)] if kind == "with" else []
            adapted = with_lora(model, benchmark.lora_rank)
            clock = _train(adapted, benchmark, callbacks, folder / "run")
            if kind == "with":
                sizes = _sizes(folder / "run")
            else:
                del clock.seconds["step"]  # of a few tokens
            if turn:
                found.append(clock.seconds)
            shutil.rmtree(folder / "run")
            model = adapted.unload()
    return {**runs, "sizes": sizes, "accelerator_peak": accelerator_peak()}


class _Rows(Dataset):
    """Rows of random tokens, of these lengths."""

    def __init__(self, lengths: list[int], vocabulary: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.rows = [torch.randint(vocabulary, (length,), generator=generator) for length in lengths]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, torch.Tensor]:
        ids = self.rows[place]
        return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


class _Clock(TrainerCallback):
    """Asks for one event after each step and measures from the end of a step to the beginning of the next one.

    That is where the Trainer logs, evaluates and saves, with everything that anyone has put around it.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._began = self._ended = 0.0
        self._previous: str | None = None

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        synchronize()
        self._began = time.perf_counter()
        if self._previous is not None:
            self.seconds[f"after {self._previous}"] = self._began - self._ended

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ) -> TrainerControl:
        synchronize()
        self._ended, self._previous = time.perf_counter(), _STEPS[state.global_step - 1]
        if self._previous == "step":
            self.seconds["step"] = self._ended - self._began
        control.should_log = self._previous == "log"
        control.should_save = self._previous == "save"
        control.should_evaluate = self._previous == "evaluation"
        return control


def _train(model: nn.Module, benchmark: Benchmark, callbacks: list, folder: Path) -> _Clock:
    first = benchmark.length if callbacks else _SHORT
    lengths = [length for length in (first, *[_SHORT] * (len(_STEPS) - 1)) for _ in range(benchmark.batch)]
    clock = _Clock()
    args = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=benchmark.batch,
        per_device_eval_batch_size=1,
        max_steps=len(_STEPS),
        learning_rate=1e-4,
        train_sampling_strategy="sequential",
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        prediction_loss_only=True,
        report_to=[],
        disable_tqdm=True,
        bf16=True,
        use_cpu=not torch.accelerator.is_available(),
    )
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=_Rows(lengths, benchmark.vocabulary),
        eval_dataset=_Rows([_SHORT] * EVALUATED, benchmark.vocabulary),
        callbacks=[*callbacks, clock],
    )
    trainer.remove_callback(PrinterCallback)
    with redirect_stdout(io.StringIO()):  # the callback's start table
        trainer.train()
    return clock


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of the checkpoint's adapter, and of what lies beside it, raw factors and record."""
    (checkpoint,) = folder.glob("checkpoint-*")
    adapter = checkpoint / "adapter_model.safetensors"
    beside = [file for file in (checkpoint / "csulora").rglob("*") if file.is_file()]
    return {"adapter": adapter.stat().st_size, "sidecar": sum(file.stat().st_size for file in beside)}
