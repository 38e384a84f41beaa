"""Measured points that outlive an interrupted run: one JSON line each, appended and never changed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from recipes.schema.recipe import RecipeError

SPLITS = ("tuning", "held_out")  # settings are chosen on the first half of the prompts and reported on the second
KEY = ("seed", "poison", "method", "strength", "rank", "draw")


def key_of(point: Mapping, names: Sequence[str] = KEY) -> tuple:
    """What tells one point from another: these of its values; see :func:`plain` for a strength of infinity."""
    return tuple(float(point[name]) if name == "strength" and point[name] == "inf" else point[name] for name in names)


def plain(value: object) -> object:
    """The value with every infinity in it written as ``"inf"``, which JSON has no number for."""
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return str(value) if value == math.inf else value


class Points:
    """The points in one file by :func:`key_of`, of the values ``names``.

    A last line without an end is what a killed run was writing: it is cut off and measured again. Anything else that
    is not a point is refused with its line number.
    """

    def __init__(self, path: Path, names: Sequence[str] = KEY) -> None:
        self.path, self.names = path, names
        self._points: dict[tuple, dict] = {}
        if not path.exists():
            return
        text = path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if whole != text:
            os.truncate(path, len(whole))
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                point = json.loads(line)
                self._points[key_of(point, names)] = point
            except (ValueError, KeyError, TypeError) as error:
                raise RecipeError(
                    f"{path}: line {number} is not a point ({error}); use another output folder"
                ) from error

    def __contains__(self, key: tuple) -> bool:
        return key in self._points

    def __getitem__(self, key: tuple) -> dict:
        return self._points[key]

    def add(self, point: dict) -> None:
        """Append one point; it is on the disk when this returns."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(point) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._points[key_of(point, self.names)] = point


def write_whole(path: Path, text: str) -> None:
    """The file appears whole or not at all."""
    unfinished = path.with_name(f".{path.name}.part")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def claim(folder: Path, described: Mapping[str, object]) -> None:
    """Refuse a folder whose points were measured on something else than what is ``described`` (flat, JSON values)."""
    path = folder / "measured_on.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(described, indent=2) + "\n")
        return
    other = difference(json.loads(path.read_text(encoding="utf-8")), described)
    if other is not None:
        raise RecipeError(f"'output': {folder} holds points of another recipe: {other}; use another output folder")


def difference(there: Mapping[str, object], here: Mapping[str, object]) -> str | None:
    """The first key of two flat descriptions whose values differ, for a person; ``None`` where none does."""
    for key in {**there, **here}:
        if there.get(key) != here.get(key):
            return f"'{key}' is {there.get(key)!r} there, but {here.get(key)!r} here"
    return None
