"""What trainers and recipes leave as JSON: log records and rows of results, read with care."""

from __future__ import annotations

import json
import math
from pathlib import Path


def read_json(path: Path, kind: type) -> object:
    """What a file holds.

    Raises:
        ValueError: if it is not JSON, or not of this kind.
    """
    return _parsed(path.read_bytes(), str(path), kind)


def read_trainer_state(path: Path) -> dict:
    """``trainer_state.json`` of the Trainer; its ``log_history`` as of :func:`read_metrics`.

    Raises:
        ValueError: if it is damaged.
    """
    state = read_json(path, dict)
    history = state.get("log_history", [])
    if not isinstance(history, list) or not all(isinstance(log, dict) for log in history):
        raise ValueError(f"{path}: expected `log_history` to be a list of records. Take the file from a copy.")
    return {**state, "log_history": [_numbers(log) for log in history if _has_step(log)]}


def read_metrics(path: Path) -> dict[str, list[dict]]:
    """The log records of a recipe by run: of each its step, and every number in it, ``None`` for one not finite.

    Raises:
        ValueError: if a line is damaged; it is named.
    """
    logs: dict[str, list[dict]] = {}
    for number, line in enumerate(path.read_bytes().splitlines() if path.is_file() else [], start=1):
        log = _parsed(line, f"{path}, line {number}", dict)
        if not isinstance(log.get("run"), str):
            raise ValueError(f"{path}, line {number}: expected the name of a `run`, but got {log.get('run')!r}.")
        if _has_step(log):
            logs.setdefault(log["run"], []).append(_numbers(log))
    return logs


def read_results(path: Path) -> list[dict]:
    """The rows of a recipe that trained and judged; those of another kind have none.

    Raises:
        ValueError: if the file is not JSON.
    """
    rows = _parsed(path.read_bytes(), str(path), object) if path.is_file() else []
    fits = isinstance(rows, list) and all(isinstance(row, dict) and isinstance(row.get("method"), str) for row in rows)
    return rows if fits else []


def _has_step(log: dict) -> bool:
    return isinstance(log.get("step"), int)


def _numbers(log: dict) -> dict:
    numbers = {key: value for key, value in log.items() if type(value) in (int, float)}
    return {key: value if math.isfinite(value) else None for key, value in numbers.items()}


def _parsed(content: bytes, source: str, kind: type) -> object:
    try:
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: expected JSON, but it cannot be read ({str(error)[:200]}).") from error
    if not isinstance(value, kind):
        raise ValueError(f"{source}: expected a {kind.__name__}, but got a {type(value).__name__}.")
    return value
