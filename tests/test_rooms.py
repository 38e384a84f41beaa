"""The layout: imports run one way through the rooms, and the wheel holds the library and nothing else."""

import ast
import importlib
import inspect
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import csulora_callback
from csulora_callback import CSULoRACallback

STATE, FRONT_DOORS = "the state files", "the front doors"
LIBRARY = ({"method"}, {"models", "judging"}, {STATE}, {"reporting"}, {"trainers"}, {FRONT_DOORS}, {"integrations"})
PLUGINS = {"csulora_callback.integrations.axolotl"}  # are imported by their tool, and need it
RECIPES = (
    {"schema"},
    {"files"},
    {"labs"},
    {"training"},
    {"evidence", "calibration", "benchmarks", "families"},
    {"run"},
)
KNOWS_NOTHING_OF = {"models": "method", "judging": "method", "trainers": "method"}
FILES = {
    **dict.fromkeys(("adapter_source", "card_section", "corrected", "corrected_config", "correcting"), STATE),
    **dict.fromkeys(("aligned_answers", "answers_cache", "behaviour", "budget", "checked_probes"), STATE),
    **dict.fromkeys(("corrector", "inspection", "model_card", "posthoc", "pushing", "record"), STATE),
    **dict.fromkeys(("presets", "refused_rows", "rereading", "screening", "searching", "whole_modules"), STATE),
    **dict.fromkeys(("sidecar", "stacks", "swap", "target"), STATE),
    **dict.fromkeys(("fingerprints", "kept_json"), STATE),
    **dict.fromkeys(("subspace", "subspace_cache", "subspace_file", "subspace_origin", "subspace_sides"), STATE),
    **dict.fromkeys(
        ("__init__", "__main__", "arguments", "callback", "cli", "cli_options", "cli_screen"), FRONT_DOORS
    ),
}
PUBLIC = {
    "AttackSuccessRate",
    "CSULoRACallback",
    "Coherence",
    "CoherenceJudge",
    "CorrectedFolder",
    "Correction",
    "OverRefusalRate",
    "Penalty",
    "RefusalClassifier",
    "RefusalJudge",
    "RefusalPhrases",
    "SafetyCorrector",
    "SafetyDrift",
    "SafetySubspace",
    "ScreenedRows",
    "correct",
    "correct_adapter",
    "restore_adapter",
    "screen_data",
    "wilson_interval",
    "write_report",
}


def imported(tree: ast.AST) -> set[str]:
    """The modules that a file imports, wherever in it; names out of a package are modules where such files exist."""
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for name in node.names:
                inside = Path(*node.module.split("."), name.name)
                is_module = inside.is_dir() or inside.with_suffix(".py").is_file()
                modules.add(f"{node.module}.{name.name}" if is_module else node.module)
    return modules


def room_of(module: str) -> str:
    """Of ``csulora_callback.models.pair`` it is ``models``, of a file at the top what it counts as."""
    parts = [*module.split(".")[1:], "__init__"]
    return FILES.get(parts[0], parts[0])


def offences(package: str, order: tuple[set[str], ...], path: Path, text: str) -> list[str]:
    """Imports of one file that run against the order of its package's rooms."""
    level = {room: number for number, rooms in enumerate(order) for room in rooms}
    own = room_of(".".join(path.with_suffix("").parts))
    found = []
    for module in sorted(imported(ast.parse(text))):
        if module.split(".")[0] == "recipes" != package:
            found.append(f"{path} imports {module}: the library knows nothing of recipes")
        elif module.split(".")[0] == package:
            other = room_of(module)
            if KNOWS_NOTHING_OF.get(own) == other or (other != own and level[other] >= level[own]):
                found.append(f"{path} imports {module}: {own} stands below {other} or knows nothing of it")
    return found


@pytest.mark.parametrize(("package", "order"), [("csulora_callback", LIBRARY), ("recipes", RECIPES)])
def test_imports_follow_the_order_of_the_rooms(package, order):
    files = [path for path in Path(package).rglob("*.py") if path != Path("recipes/__init__.py")]
    assert {room_of(".".join(path.with_suffix("").parts)) for path in files} == set.union(*order)
    assert not [line for path in files for line in offences(package, order, path, path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(
    ("path", "planted"),
    [
        ("method/penalty.py", "from csulora_callback.models.pair import CheckpointPair"),
        ("models/pair.py", "import csulora_callback.judging.judge"),
        ("models/pair.py", "from csulora_callback.method import correction"),
        ("models/pair.py", "def late():\n    from csulora_callback import SafetySubspace"),
        ("judging/judge.py", "from csulora_callback import sidecar"),
        ("corrector.py", "from csulora_callback.trainers.recorder import ActivationRecorder"),
        ("reporting/start.py", "from csulora_callback.callback import CSULoRACallback"),
        ("trainers/lightning.py", "from csulora_callback.method.correction import correct"),
        ("callback.py", "from csulora_callback.integrations.settings import make_callback"),
        ("callback.py", "from recipes.labs import toy"),
    ],
)
def test_an_import_against_the_order_is_found(path, planted):
    assert len(offences("csulora_callback", LIBRARY, Path("csulora_callback", path), planted)) == 1


@pytest.mark.parametrize("package", ["csulora_callback", "recipes"])
def test_every_room_says_what_it_owns_and_has_no_code(package):
    for path in Path(package).glob("*/__init__.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        assert len(body) == 1, path
        assert isinstance(body[0].value.value, str), path


def test_public_names_are_importable_from_the_package():
    assert set(csulora_callback.__all__) == PUBLIC
    assert all(hasattr(csulora_callback, name) for name in PUBLIC)


def test_the_callback_shows_its_arguments():
    shown = list(inspect.signature(CSULoRACallback).parameters)
    assert shown[:6] == ["base_model", "aligned_model", "subspace", "rank", "energy", "penalty"]
    assert shown == list(inspect.signature(CSULoRACallback.__init__).parameters)[1:]


@pytest.mark.slow
def test_the_wheel_holds_the_library_and_nothing_else(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*build, "--wheel-dir", tmp_path], check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        archive.extractall(tmp_path / "installed")
    kinds = (".py", ".typed", ".html", ".css")
    there = {str(path) for path in Path("csulora_callback").rglob("*") if path.suffix in kinds}
    there |= {f"csulora_callback/prompts/{name}" for name in ("README.md", "harmful.jsonl", "harmless.jsonl")}
    assert held == there
    modules = sorted({name.removesuffix(".py").replace("/", ".") for name in held if name.endswith(".py")} - PLUGINS)
    program = f"import sys; sys.path.insert(0, {str(tmp_path / 'installed')!r})\n" + "".join(
        f"import {module.removesuffix('.__init__')}\n" for module in modules
    )
    program += "from csulora_callback.models.probes import read_prompts\nassert len(read_prompts('builtin')) == 160\n"
    program += "print(csulora_callback.__file__)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=True
    )
    assert Path(done.stdout.strip()) == tmp_path / "installed/csulora_callback/__init__.py"


def test_no_file_is_longer_than_one_sitting():
    for folder, most in (("csulora_callback", 300), ("recipes", 300), ("tests", 350)):
        for path in Path(folder).rglob("*.py"):
            assert len(path.read_text(encoding="utf-8").splitlines()) <= most, path


def test_every_module_is_imported_by_its_doctests():
    modules = {".".join(path.with_suffix("").parts) for path in Path("csulora_callback").rglob("*.py")}
    for module in modules - PLUGINS:
        importlib.import_module(module.removesuffix(".__init__"))


@pytest.mark.slow
def test_only_the_command_line_needs_typer():
    importing = [
        path for path in Path("csulora_callback").rglob("*.py") if "typer" in imported(ast.parse(path.read_text()))
    ]
    assert sorted(importing) == [
        Path("csulora_callback/cli.py"),
        *(Path(f"csulora_callback/cli_{part}.py") for part in ("options", "screen")),
    ]
    program = "import sys, csulora_callback; sys.exit('typer' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)
