"""What processes of their own are given to do; a module that imports nothing, as each of them imports it."""

import os
import time


def answers(value: int, report) -> dict:
    report("first")
    print("not to be seen", flush=True)
    return {"twice": 2 * value}


def hangs(value: int, report) -> dict:
    report("second")
    time.sleep(600)
    return {}


def dies(value: int, report) -> dict:
    report("third")
    os._exit(value)


def fails(value: int, report) -> dict:
    raise KeyError(value)
