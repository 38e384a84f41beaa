"""What trackers have written, read from their own files."""

from __future__ import annotations

import io
import json
import sqlite3
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

Images = dict[int, dict[str, np.ndarray]]
"""Pixels by step and name."""


def offline(folder: Path) -> dict[str, str]:
    """The environment in which trackers write into a folder, and nowhere else."""
    return {
        "TENSORBOARD_LOGGING_DIR": str(folder / "tensorboard"),
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(folder),
        "WANDB_SILENT": "true",
        "WANDB_CONSOLE": "off",
        "MLFLOW_TRACKING_URI": (folder / "mlruns").as_uri(),
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "TRACKIO_DIR": str(folder / "trackio"),
    }


def tensorboard_images(folder: Path) -> Images:
    """Those in its event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0}).Reload()
    tags = events.Tags()["images"]
    return _by_step((event.step, tag, event.encoded_image_string) for tag in tags for event in events.Images(tag))


def wandb_images(folder: Path) -> Images:
    """Those that the history of its one offline run has, in either trainer, at the trainer's steps."""
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    found = []
    for row in wandb_history(file):
        step = row.get("train/global_step", row.get("trainer/global_step"))
        for key, value in row.items():
            if key.endswith("/path"):  # of one image
                found.append((step, key.removesuffix("/path"), file.parent / "files" / value))
            elif key.endswith("/filenames"):  # of a list of images
                (name,) = value
                found.append((step, key.removesuffix("/filenames"), file.parent / "files" / name))
    return _by_step(found)


def mlflow_images(folder: Path) -> Images:
    """Those in its file store, where they are NAME+step+STEP+timestamp+…, with ~ for /."""
    files = [path for path in (folder / "mlruns").rglob("*.png") if "+step+" in path.name]
    parts = [(path, path.name.split("+")) for path in files]
    return _by_step((int(part[2]), part[0].replace("~", "/"), path) for path, part in parts)


def trackio_images(folder: Path) -> Images:
    """Those of its one project."""
    (file,) = (folder / "trackio").glob("*.db")
    with sqlite3.connect(file) as database:
        rows = [json.loads(metrics) for (metrics,) in database.execute("SELECT metrics FROM metrics")]
    media = folder / "trackio/media"
    return _by_step(
        (row["train/global_step"], key, media / value["file_path"])
        for row in rows
        for key, value in row.items()
        if isinstance(value, dict)
    )


def _by_step(images: Iterable[tuple[int, str, bytes | Path]]) -> Images:
    found: Images = {}
    for step, name, image in images:
        assert name not in found.setdefault(step, {}), f"twice at step {step}: {name}"
        pixels = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)
        found[step][name] = np.asarray(pixels.convert("RGB"))
    return dict(sorted(found.items()))


def wandb_history(file: Path) -> list[dict]:
    """Rows of the history in an offline run's file: LevelDB's log format, around records of wandb's own protobuf."""
    from wandb.proto.wandb_internal_pb2 import Record

    header, block = 7, 32768
    data, position, whole, rows = file.read_bytes(), header, b"", []
    while position + header <= len(data):
        if block - position % block < header:  # what no header fits into is padding
            position += block - position % block
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        whole += data[position + header : position + header + length]
        position += header + length
        if kind in (1, 4):  # a full record, or the last part of one
            record, whole = Record.FromString(whole), b""
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows
