"""The command as a user gets it: out of the wheel, in an environment of its own."""

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import torch

from csulora_callback import SafetySubspace
from tests.helpers.command_line import ROOT, run_process
from tests.helpers.lab import PENALTY, RANK, TARGETS, assert_same, corrected_by_hand, saved, tiny_llama, with_lora
from tests.helpers.reports import Page


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A fresh environment with the wheel in it; what it depends on is borrowed from this one, without its installs."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--quiet"]
    wheel = [*pip, "wheel", ".", "--no-deps", "--no-build-isolation", "--wheel-dir", folder]
    subprocess.run(wheel, cwd=ROOT, check=True, timeout=300)
    venv.create(folder / "fresh")
    fresh = folder / "fresh/bin/python"
    (file,) = folder.glob("*.whl")
    program = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = subprocess.run([fresh, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
    # Only what lies in a folder is borrowed by its path: of an editable install the .pth file there is not read.
    Path(own, "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    install = [*pip, "--python", fresh, "install", "--no-deps", "--no-index", "--force-reinstall", file]
    subprocess.run(install, check=True, timeout=300)
    return folder / "fresh/bin"


@pytest.mark.slow
def test_the_wheel_brings_the_command(installed, pair, tmp_path):
    where = subprocess.run(
        [installed / "python", "-P", "-c", "import csulora_callback; print(csulora_callback.__file__)"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert installed.parent in Path(where.stdout.strip()).parents
    command = [installed / "csulora"]
    done = run_process("--help", command=command)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Usage: csulora ")

    torch.manual_seed(0)
    with_lora(tiny_llama(), init_lora_weights=False).save_pretrained(tmp_path / "adapter")
    subspace = SafetySubspace.estimate(*pair, target_modules=TARGETS, rank=RANK, progress=False)
    subspace.save(tmp_path / "subspace.safetensors")
    arguments = ["--subspace", tmp_path / "subspace.safetensors", "--strength", PENALTY.parameters["strength"]]
    done = run_process("correct", tmp_path / "adapter", "-o", tmp_path / "made", *arguments, command=command)
    assert done.returncode == 0, done.stderr
    assert_same(saved(tmp_path / "made"), corrected_by_hand(saved(tmp_path / "adapter"), subspace))
    done = run_process("report", tmp_path / "made", "-o", tmp_path / "report.html", command=command)
    assert done.returncode == 0, done.stderr
    assert len(Page.read(tmp_path / "report.html").figures()) == 6
