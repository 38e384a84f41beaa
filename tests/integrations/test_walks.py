"""The blocks of the section `In other tools`: each can be read everywhere, and runs where its tool is installed."""

import ast
import json
import re
import shlex
from importlib.util import find_spec

import pytest
import torch
import yaml

import csulora_callback
from csulora_callback.integrations.settings import make_callback
from tests.helpers.lab import raw, saved
from tests.helpers.walks import assert_corrected, blocks, lay_out, run

TOOLS = ("axolotl", "llamafactory", "swift", "sentence_transformers", "unsloth")
MEASURED_BY_WEIGHTS = ('probes="builtin"', "strength=5.0"), ("penalty=Penalty.csulora(10)", "strength=5.0")
ON_A_CPU = (  # of axolotl
    "lora_mlp_kernel: false\nbf16: false\nuse_cpu: true\nsequence_len: 32\nseed: 7\nval_set_size: 0.1\neval_steps: 5\n"
)
SEEDED = (  # axolotl draws a fresh adapter before it seeds anything
    "import runpy, sys, torch; torch.manual_seed(7); sys.argv.pop(0); "
    "runpy.run_module(sys.argv[0], run_name='__main__')"
)
TINY_IN_SWIFT = (
    "--model_type llama --template default --torch_dtype float32 --max_length 32 --split_dataset_ratio 0 "
    "--gradient_accumulation_steps 1 --target_modules all-linear"
)


def test_every_tool_has_a_block():
    assert [name for name in blocks() if name in TOOLS] == list(TOOLS)


@pytest.mark.parametrize("name", [name for name, (language, _) in blocks().items() if language == "python"])
def test_a_block_of_python_names_what_there_is(name):
    tree = ast.parse(blocks()[name][1])
    ours = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "csulora_callback"]
    assert {alias.name for node in ours for alias in node.names} <= set(csulora_callback.__all__)
    (call,) = (
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "CSULoRACallback"
    )
    eval(ast.unparse(call), dict(vars(csulora_callback)))  # the constructor refuses what it does not have


def test_the_block_of_axolotl_makes_a_callback():
    read = yaml.safe_load(blocks()["axolotl"][1])
    assert read["plugins"] == ["csulora_callback.integrations.axolotl.CSULoRAPlugin"]
    assert make_callback(read["csulora"]).target == 0.9


def test_the_command_of_swift_names_what_the_file_puts_into_the_map():
    words = shlex.split(blocks()["swift command"][1].replace("\\\n", ""))
    (name,) = re.findall(r'callbacks_map\["(\w+)"\]', blocks()["swift"][1])
    assert words[words.index("--callbacks") + 1] == name


@pytest.fixture
def folder(tmp_path, request):
    tool = request.node.originalname.removeprefix("test_").partition("_runs")[0]
    if find_spec(tool) is None:
        pytest.skip(f"{tool} is not installed")
    lay_out(tmp_path)
    return tmp_path


def by_weights(text: str) -> str:
    """With a penalty that is measured by weights alone, for which there are dense references."""
    for asked, instead in MEASURED_BY_WEIGHTS:
        text = text.replace(asked, instead)
    return text


@pytest.mark.slow
def test_llamafactory_runs(folder):
    settings = blocks()["llamafactory settings"][1].replace("llama3", "default")  # whose words the tiny one has
    (folder / "sft.yaml").write_text(settings)
    (folder / "walk.py").write_text(by_weights(blocks()["llamafactory"][1]))
    assert "CSULoRA" in run(["walk.py"], folder, DISABLE_VERSION_CHECK="1")
    for adapter in ("out", "out/checkpoint-16"):
        assert_corrected(folder / adapter, folder)


@pytest.mark.slow
def test_swift_runs(folder):
    (folder / "FILE.py").write_text(by_weights(blocks()["swift"][1]))
    _, kind, *words = shlex.split(blocks()["swift command"][1].replace("\\\n", ""))
    assert kind == "sft"
    words += shlex.split(TINY_IN_SWIFT)
    words = [str(folder / word) if word in ("org/aligned", "train.jsonl", "FILE.py") else word for word in words]
    assert "CSULoRA" in run(["-m", "swift.cli.sft", *words], folder)
    (adapter,) = folder.glob("out/v*/checkpoint-16")
    assert_corrected(adapter, folder)


@pytest.mark.slow
def test_sentence_transformers_runs(folder):
    (folder / "walk.py").write_text(
        blocks()["sentence_transformers"][1].replace('"org/base"', '"org/base", strength=5.0')
    )
    assert "CSULoRA" in run(["walk.py"], folder)
    assert_corrected(folder / "out/checkpoint-8", folder, head=False)


@pytest.mark.slow
def test_unsloth_runs(folder):
    """On its CPU backend, which holds the aligned model in bfloat16, and so the displacement's one side."""
    (folder / "walk.py").write_text(by_weights(blocks()["unsloth"][1]))
    assert "CSULoRA" in run(["walk.py"], folder)
    for adapter in ("out", "out/checkpoint-8"):
        assert_corrected(folder / adapter, folder, dtype=torch.bfloat16)


@pytest.mark.slow
def test_axolotl_runs(folder):
    """And trains bit for bit as without the plugin."""
    text = ON_A_CPU + blocks()["axolotl"][1].replace("probes: builtin", "strength: 5.0")
    (folder / "walk.yaml").write_text(text)
    assert "CSULoRA" in run(["-c", SEEDED, "axolotl.cli.train", "walk.yaml"], folder)
    (folder / "plain.yaml").write_text(text[: text.index("plugins:")].replace("output_dir: out", "output_dir: plain"))
    run(["-c", SEEDED, "axolotl.cli.train", "plain.yaml"], folder)
    last = max(int(path.name.partition("-")[2]) for path in folder.glob("plain/checkpoint-*"))
    for place in ("", f"checkpoint-{last}"):
        assert_corrected(folder / "out" / place, folder)
        for key, value in saved(folder / "plain" / place).items():
            assert torch.equal(value, raw(folder / "out" / place)[key]), key
    assert "csulora:begin" in (folder / "out/README.md").read_text()


@pytest.mark.slow
def test_axolotl_runs_measured_by_activations(folder):
    """Its kernels, which it would switch on by itself, stay off, and its model card is of evaluations at the start."""
    text = ON_A_CPU.replace("lora_mlp_kernel: false\n", "") + blocks()["axolotl"][1]
    text = text.replace("probes: builtin", "probes: probes.txt\n  strength: 10")
    (folder / "walk.yaml").write_text(text)
    printed = run(["-m", "axolotl.cli.train", "walk.yaml"], folder)
    assert "lora_mlp_kernel, lora_qkv_kernel, lora_o_kernel, lora_embedding_kernel stay off" in printed
    assert "eval_csulora/refusal_kept_corrected" in printed
    record = json.loads((folder / "out/csulora/correction.json").read_text())
    assert record["penalty"] == {"name": "data_aware", "strength": 10.0}
    assert any(not torch.equal(value, raw(folder / "out")[key]) for key, value in saved(folder / "out").items())
