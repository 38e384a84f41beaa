"""A function called in a process of its own that may hang, be killed or break its interpreter."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection

_GRACE = 10.0  # seconds to end in, after the answer


class Died(RuntimeError):
    """The process ended or was ended without an answer.

    Attributes:
        stage: what it said last that it was about to do.
    """

    def __init__(self, message: str, stage: str) -> None:
        super().__init__(message)
        self.stage = stage


def call(function: Callable[..., dict], argument: object, seconds: float, preload: str) -> dict:
    """What ``function(argument, report)`` gives there, where ``report`` takes a stage's name.

    Processes are forked from one that has imported the module ``preload`` and does nothing else, so that none of them
    waits for imports and none sees what another did.

    Raises:
        Died: if there is no answer, or not within so many seconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(function, argument, theirs), daemon=True)
    process.start()
    theirs.close()
    stage, deadline = "", time.monotonic() + seconds
    try:
        while True:
            if not ours.poll(max(0.0, deadline - time.monotonic())):
                raise Died(f"no answer within {seconds:g} s", stage)
            what, value = ours.recv()
            if what == "answer":
                process.join(_GRACE)
                return value
            if what == "error":
                raise Died(value, stage)
            stage = value
    except EOFError:
        process.join()
        raise Died(f"the process ended with status {process.exitcode}", stage) from None
    finally:
        process.kill()
        process.join()
        ours.close()


def _run(function: Callable[..., dict], argument: object, connection: Connection) -> None:
    silent = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # what libraries say would break into the progress bar
        os.dup2(silent, stream)
    try:
        connection.send(("answer", function(argument, lambda stage: connection.send(("stage", stage)))))
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        connection.send(
            ("error", f"{type(error).__name__} in {os.path.basename(last.filename)}:{last.lineno}: {error}")
        )
