"""Files and folders that appear whole or not at all, with many writers, dead ones and failing ones."""

import os
import platform
import signal
import stat
import subprocess
import sys
import threading
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from csulora_callback.models import whole_files
from csulora_callback.models.whole_files import put_folder, remove_abandoned, write_whole

ROOT = Path(__file__).parents[2]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fill(folder: Path, text: str) -> None:
    for number in range(5):
        (folder / f"{number}.txt").write_text(text)


def test_a_file_replaces_another(tmp_path):
    path = tmp_path / "a" / "b" / "file.txt"
    for text in ("first", "second"):
        write_whole(path, lambda place, text=text: place.write_text(text))
        assert path.read_text() == text
    assert names(path.parent) == ["file.txt"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failure_leaves_what_was_there_and_nothing_else(tmp_path, error):
    def fail(place):
        (place / "half" if place.is_dir() else place).write_text("half")
        raise error("in the middle")

    for put in (write_whole, put_folder):
        with pytest.raises(error, match="in the middle"):
            put(tmp_path / "new", fail)
    assert names(tmp_path) == []
    write_whole(tmp_path / "file", lambda place: place.write_text("old"))
    put_folder(tmp_path / "folder", lambda place: fill(place, "old"))
    for put, name in ((write_whole, "file"), (put_folder, "folder")):
        with pytest.raises(error, match="in the middle"):
            put(tmp_path / name, fail)
    assert names(tmp_path) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "4.txt").read_text() == "old"


def test_a_folder_replaces_another_whole_and_no_file(tmp_path):
    put_folder(tmp_path / "deep" / "folder", lambda place: (place / "other.txt").write_text("old"))
    put_folder(tmp_path / "deep" / "folder", lambda place: fill(place, "new"))
    assert names(tmp_path / "deep") == ["folder"]
    assert names(tmp_path / "deep" / "folder") == [f"{number}.txt" for number in range(5)]
    (tmp_path / "file").write_text("kept")
    with pytest.raises(NotADirectoryError):
        put_folder(tmp_path / "file", lambda place: fill(place, "new"))
    assert (tmp_path / "file").read_text() == "kept"
    assert names(tmp_path) == ["deep", "file"]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_modes_follow_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_whole(tmp_path / "file", lambda place: save_file({"a": torch.ones(3)}, place))
        put_folder(tmp_path / "folder", lambda place: save_file({"a": torch.ones(3)}, place / "file"))
    finally:
        os.umask(before)
    for file in (tmp_path / "file", tmp_path / "folder" / "file"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~umask
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o777 & ~umask


def test_names_of_any_length(tmp_path):
    for name in ("x" * 255, "é" * 127, "漢" * 85):
        write_whole(tmp_path / name, lambda place: place.write_text("whole"))
        assert (tmp_path / name).read_text() == "whole"
    assert len(names(tmp_path)) == 3


def write_often(folder: Path, text: str) -> None:
    for _ in range(50):
        write_whole(folder / "file", lambda place: place.write_text(text * 5000))
        put_folder(folder / "folder", lambda place: fill(place, text))


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_of_many_that_write_at_once_one_wins_whole(tmp_path, monkeypatch, kind):
    failures = []
    monkeypatch.setattr(threading, "excepthook", lambda arguments: failures.append(arguments.exc_value))
    start = threading.Thread if kind == "threads" else get_context("fork").Process
    writers = [start(target=write_often, args=(tmp_path, text)) for text in "abcd"]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        text = (tmp_path / "file").read_text() if (tmp_path / "file").exists() else "a" * 5000
        assert len(text) == 5000
        assert len(set(text)) == 1
    for writer in writers:
        writer.join()
    assert not failures
    assert kind == "threads" or all(writer.exitcode == 0 for writer in writers)
    assert names(tmp_path) == ["file", "folder"]
    assert names(tmp_path / "folder") == [f"{number}.txt" for number in range(5)]
    assert len({file.read_text() for file in (tmp_path / "folder").iterdir()}) == 1


KILLED = """
import os, pathlib, signal, sys
from csulora_callback.models.whole_files import write_whole, put_folder
def die(place):
    (place / "half" if place.is_dir() else place).write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
{"file": write_whole, "folder": put_folder}[sys.argv[2]](pathlib.Path(sys.argv[1], sys.argv[2]), die)
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_writer_leaves_is_removed_by_the_next_one(tmp_path, kind):
    # Only the helper is imported, which needs nothing but the standard library.
    program = KILLED.replace("csulora_callback.models.whole_files", "whole_files")
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "csulora_callback" / "models")}
    done = subprocess.run([sys.executable, "-c", program, tmp_path, kind], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(f".{kind}.")
    write_whole(tmp_path / "other", lambda place: place.write_text("whole"))
    assert names(tmp_path) == ["other"]


def workplace(folder: Path, process: int, machine: str | None = None, hours: float = 0.0) -> Path:
    path = folder / f".file.{machine or whole_files._machine()}.{process}.00112233.part"
    path.mkdir()
    (path / "file").write_text("half")
    moment = time.time() - 3600 * hours
    os.utime(path, (moment, moment))
    return path


def test_what_a_live_process_writes_is_left_alone(tmp_path):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        live = workplace(tmp_path, other.pid)
        own = workplace(tmp_path, os.getpid())
        first = workplace(tmp_path, 1)  # another user's, for whoever is not root
        elsewhere = workplace(tmp_path, 2**22 + 1, machine="0" * 8, hours=23)
        foreign = tmp_path / ".download.part"
        foreign.mkdir()
        remove_abandoned(tmp_path)
        assert set(tmp_path.iterdir()) == {live, own, first, elsewhere, foreign}
        other.communicate(b"\n")
    remove_abandoned(tmp_path)
    assert set(tmp_path.iterdir()) == {own, first, elsewhere, foreign}


def test_what_is_older_than_a_day_is_removed(tmp_path):
    workplace(tmp_path, os.getpid(), hours=25)
    workplace(tmp_path, 2**22 + 1, machine="0" * 8, hours=25)
    workplace(tmp_path, 10**30, machine="1" * 8, hours=25)
    remove_abandoned(tmp_path)
    assert names(tmp_path) == []
    remove_abandoned(tmp_path / "not there")


@pytest.mark.skipif(platform.system() != "Linux", reason="containers are Linux's")
def test_process_ids_of_another_container_are_not_believed(monkeypatch):
    here = whole_files._machine()
    monkeypatch.setattr(os, "readlink", lambda path: "pid:[4026530000]")
    assert whole_files._machine() != here
