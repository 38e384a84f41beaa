"""The command line, as a process of its own or, where only its answer counts, in this one."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

from csulora_callback.cli import app

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "csulora_callback"]


def run_process(*arguments: object, command: list | None = None, **environment: str) -> subprocess.CompletedProcess:
    """What a user runs, piped; nothing of this process is inherited but PATH and the cache."""
    return subprocess.run(
        [*(command or COMMAND), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def run(*arguments: object) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a command in this process."""
    output, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(error):
        try:
            app([str(argument) for argument in arguments], prog_name="csulora")
            status = 0
        except SystemExit as end:
            status = end.code
    return status, output.getvalue(), error.getvalue()
