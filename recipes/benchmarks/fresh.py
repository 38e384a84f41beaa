"""What is measured in a process of its own, in which nothing has run: ``python -m recipes.benchmarks.fresh JOB JSON``.

It prints one line of JSON. Peak memory counts from what is resident after all imports, and includes mapped files.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from csulora_callback import SafetySubspace
from recipes.benchmarks.synthetic import files_with
from recipes.benchmarks.timing import Time, accelerator_peak, resident_bytes, timed
from recipes.training.task import device


def in_fresh_process(job: str, **arguments: object) -> dict:
    """What a job of this file gives when a new interpreter runs it.

    Raises:
        RuntimeError: with what it wrote, if it fails.
    """
    command = [sys.executable, "-m", __spec__.name, job, json.dumps(arguments)]
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"{job} failed in its own process:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def start(base: str, aligned: str, names: list[str], rank: int | None, cache: str | None, repeats: int = 1) -> dict:
    """Estimate the subspace, and keep it in ``cache``; after each estimate read both checkpoints once."""
    before, estimates, readings = resident_bytes("VmRSS"), [], []
    peak = None
    for _ in range(repeats):
        estimates.append(timed(lambda: estimate(base, aligned, names, rank, cache)))
        peak = peak or {"resident": resident_bytes("VmHWM") - before, "accelerator": accelerator_peak()}
        readings.append(reading([base, aligned], names))
    return {"estimate": estimates, "reading": readings, "peak": peak}


def cold(base: str, aligned: str, names: list[str], rank: int | None) -> dict:
    """An estimate without a cache, and reading, each of files that are not in the page cache."""
    folders = [base, aligned]
    leave_page_cache(folders)
    estimated = timed(lambda: estimate(base, aligned, names, rank, None))
    leave_page_cache(folders)
    return {"cold estimate": [estimated], "cold reading": [reading(folders, names)]}


def again(base: str, aligned: str, names: list[str], rank: int | None, cache: str) -> dict:
    """The same where the cache holds it, which has to be so."""
    found = []
    taken = timed(lambda: found.append(estimate(base, aligned, names, rank, cache)))
    if not found[0].from_cache:
        raise RuntimeError("expected a second start to find the subspace in the cache, but it did not")
    return {"again": [taken]}


def load(base: str, aligned: str) -> dict:
    """Both models as transformers loads them; their peak counts what is mapped as if all of it had been read."""
    before, models = resident_bytes("VmRSS"), []

    def both() -> None:
        models.extend(
            AutoModelForCausalLM.from_pretrained(side, dtype="auto").to(device()) for side in (base, aligned)
        )

    taken = timed(both)
    for model in models:
        for weight in model.parameters():
            weight.detach().view(torch.uint8).max()
    return {"load": [taken], "peak": {"resident": resident_bytes("VmHWM") - before, "accelerator": accelerator_peak()}}


def estimate(base: str, aligned: str, names: list[str], rank: int | None, cache: str | None) -> SafetySubspace:
    """Through the library's front door, computed where the models would be."""
    return SafetySubspace.estimate(base, aligned, names, rank=rank, device=device(), progress=False, cache_dir=cache)


def reading(folders: list[str], names: list[str]) -> Time:
    """Every target weight of these checkpoints copied once, from the mapped file into memory of its own."""
    files = [(file, keys) for folder in folders for file, keys in files_with(Path(folder), names).items()]

    def read() -> None:
        for file, keys in files:
            with safe_open(file, "pt") as opened:
                for key in keys:
                    opened.get_tensor(key).to(device(), copy=True)

    return timed(read)


def leave_page_cache(folders: list[str]) -> None:
    """Have the system forget the files, so that they come from the disk next, or what it takes for one."""
    for folder in folders:
        for path in Path(folder).glob("*.safetensors"):
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


JOBS: dict[str, Callable[..., dict]] = {"start": start, "cold": cold, "again": again, "load": load}

if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print(json.dumps(JOBS[sys.argv[1]](**json.loads(sys.argv[2]))))
