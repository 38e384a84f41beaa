"""Run things on two processes over gloo, as a user launches them."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc_per_node={processes}", "--master_port={port}"],
    "accelerate": [
        "accelerate.commands.accelerate_cli",
        "launch",
        "--multi_gpu",  # or it starts one process; without GPUs the processes use gloo
        "--num_processes={processes}",
        "--num_machines=1",
        "--mixed_precision=no",
        "--dynamo_backend=no",
        "--main_process_port={port}",
    ],
}


def run_on_two(module: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    """``torchrun -m module arguments``; the caller looks at the exit status."""
    return torchrun("-m", module, *map(str, arguments), **environment)


def leave() -> None:
    """End a worker that has done its work.

    Not through the interpreter's end: there, outside Python, torch's threads abort one process in some twenty.
    """
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)


def run_worker(module: str, engine: str, pair: Path, folder: Path) -> dict:
    """Run the worker of a module with an engine; what its first process reports in ``folder``."""
    environment = {"DS_ACCELERATOR": "cpu"} if "zero" in engine else {}
    done = run_on_two(module, engine, pair, folder, **environment)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads((folder / "report.json").read_text())


def torchrun(
    *command: str, launcher: str = "torchrun", processes: int = 2, **environment: str
) -> subprocess.CompletedProcess:
    """Launch a command from the root of the project; one that hangs is ended after five minutes, and raises."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = [part.format(processes=processes, port=port) for part in LAUNCHERS[launcher]]
    return subprocess.run(
        [sys.executable, "-m", *launch, *command],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
