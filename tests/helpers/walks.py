"""The blocks of the section `In other tools`, and tiny checkpoints and data under the names that stand there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForCausalLM

from csulora_callback import Penalty, correct
from tests.helpers import refusing, small_talk
from tests.helpers.lab import raw, saved

PAGE = Path(__file__).parents[2] / "csulora_callback/README.md"
STRENGTH, RANK = 5.0, 4  # the least rank that the rule gives, and what it gives of sides of 32
QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "USE_HF": "1", "AXOLOTL_DO_NOT_TRACK": "1"}


def blocks() -> dict[str, tuple[str, str]]:
    """Language and text of each marked block."""
    found = re.findall(r"^<!-- walk: ([\w ]+) -->\n```(\w+)\n(.*?)^```$", PAGE.read_text("utf-8"), re.M | re.DOTALL)
    return {name: (language, text) for name, language, text in found}


def lay_out(folder: Path) -> None:
    """What the blocks name: two checkpoints, and rows in the formats that the tools read."""
    base, _ = refusing.save_pair(folder / "org")
    small_talk.tokenizer().save_pretrained(base)
    asked = [*refusing.HARMLESS, *refusing.RESTRICTED]
    said = [(asked[n % len(asked)], small_talk.story(small_talk.NOUNS[n % 6], "sees", "fox")) for n in range(64)]
    turns = [[{"role": "user", "content": ask}, {"role": "assistant", "content": answer}] for ask, answer in said]
    lines = {
        "train.jsonl": [{"messages": messages} for messages in turns],
        "pairs.jsonl": [{"anchor": question, "positive": answer} for question, answer in said],
        "data/my_data.jsonl": [{"instruction": question, "input": "", "output": answer} for question, answer in said],
    }
    (folder / "data").mkdir()
    for name, rows in lines.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "data/dataset_info.json").write_text(json.dumps({"my_data": {"file_name": "my_data.jsonl"}}))
    (folder / "probes.txt").write_text("\n".join([*refusing.RESTRICTED, *refusing.SHORTER]))


def run(arguments: list[str], folder: Path, **environment: str) -> str:
    """What a command of Python's prints, in a folder with what is laid out there."""
    root = str(PAGE.parents[1])
    paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, **QUIET, "PYTHONPATH": paths, "XDG_CACHE_HOME": str(folder / "cache"), **environment}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


@torch.no_grad()
def assert_corrected(adapter: Path, folder: Path, head: bool = True, dtype: torch.dtype | None = None) -> None:
    """What lies in an adapter's folder is the correction of its raw factors, by a dense SVD of the displacement."""
    kind = AutoModelForCausalLM if head else AutoModel
    base, aligned = (
        kind.from_pretrained(folder / "org" / name, dtype=dtype if name == "aligned" else torch.float32)
        for name in ("base", "aligned")
    )
    before, after = raw(adapter), saved(adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    names = [key.removesuffix(".lora_A.weight") for key in before if key.endswith(".lora_A.weight")]
    assert names
    assert before.keys() == after.keys()
    for name in names:
        module = name.removeprefix("base_model.model.")
        A, B = (before[f"{name}.lora_{side}.weight"] for side in "AB")
        weights = (model.get_submodule(module).weight.double() for model in (aligned, base))
        U, _, Vh = torch.linalg.svd(torch.sub(*weights), full_matrices=False)
        bases = U[:, :RANK].float(), Vh[:RANK].T.float()
        done = correct(A, B, *bases, Penalty.csulora(STRENGTH), config["lora_alpha"] / config["r"])
        expected = done.lora_B @ done.lora_A
        written = after[f"{name}.lora_B.weight"] @ after[f"{name}.lora_A.weight"]
        assert (written - expected).norm() < 1e-4 * expected.norm(), name
        assert (B @ A - expected).norm() > 0.01 * expected.norm(), name
