"""The benchmark runs and says what it found; its references, its synthetic pair and its arithmetic are checked."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, TrainerCallback

from csulora_callback import SafetySubspace, correct
from recipes.benchmarks import benchmark, computed, fresh, goals, growth, page, report, training
from recipes.benchmarks.correction import dense_closest, with_lora
from recipes.benchmarks.estimation import PENALTIES, quality, update_beside
from recipes.benchmarks.shapes import LLAMA, Shape
from recipes.benchmarks.synthetic import displacement, files_with, write_pair
from recipes.files.recipe import load_recipe
from recipes.run import main
from recipes.schema.measured import Benchmark

TINY = Shape(32, 64, layers=2, heads=4, kv_heads=2, head_dim=8, vocabulary=48, tied=True)
RUN = [
    "smoke=true",
    "benchmark.repeats=1",
    "benchmark.sizes=[0.5,1.0]",
    "benchmark.ranks=[4]",
    "benchmark.depths=[1]",
    "benchmark.length=16",
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return write_pair(TINY, tmp_path_factory.mktemp("pair"), shards=4)


@pytest.mark.slow
def test_it_runs_from_end_to_end_and_says_what_it_found(tmp_path, capsys):
    (tmp_path / "scratch").mkdir()
    output, scratch = tmp_path / "out", f"benchmark.scratch={tmp_path / 'scratch'}"
    assert main(["recipes/benchmark.yaml", *RUN, scratch, f"output={output}"]) == 0
    results = json.loads((output / "results.json").read_text(), parse_constant=pytest.fail)
    assert all(math.isfinite(number) for number in numbers_in(results))
    assert all(one["seconds"] > 0 for one in times_in(results))
    assert results["model"]["modules"] == 14
    on_cpu = not torch.accelerator.is_available()
    assert (results["machine"]["device"] == "cpu") == on_cpu == (results["training"]["accelerator_peak"] == 0)
    assert results["sizes"]["adapter"] > 0 < results["sizes"]["sidecar"]
    assert max(results["correction"]["agreement"].values()) < 1e-5
    assert all(errors["guard"] < 1e-3 > errors["energy_lost"] for errors in results["quality"].values())
    assert results["goals"] == goals.judge(results)
    text, printed = (output / "report.md").read_text(), capsys.readouterr().out
    assert text == report.to_markdown(results)
    assert all(row["goal"] in text for row in results["goals"])
    assert "a tiny Llama: 2 layers" in text
    assert "reading both checkpoints" in printed
    assert (output / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    assert not list((tmp_path / "scratch").iterdir())


def numbers_in(value: object) -> list[float]:
    if isinstance(value, dict | list):
        return [number for one in (value.values() if isinstance(value, dict) else value) for number in numbers_in(one)]
    return [value] if isinstance(value, int | float) else []


def times_in(value: object) -> list[dict]:
    if isinstance(value, dict) and value.keys() == {"seconds", "cpu"}:
        return [value]
    if isinstance(value, dict | list):
        return [time for one in (value.values() if isinstance(value, dict) else value) for time in times_in(one)]
    return []


def test_the_sizes_are_those_that_transformers_builds():
    published = {"Llama-3.1-8B": 8_030_261_248, "Llama-3.1-70B": 70_553_706_496, "Llama-3.1-405B": 405_853_388_800}
    assert {name: shape.parameters for name, shape in LLAMA.items()} == published
    smallest = Shape.of(load_recipe("recipes/benchmark.yaml", []).benchmark)
    assert smallest.parameters == 1_235_814_400
    assert Shape.of(load_recipe("recipes/benchmark_8b.yaml", []).benchmark) == LLAMA["Llama-3.1-8B"]
    for shape in (smallest, TINY):
        with torch.device("meta"):
            model = LlamaForCausalLM(shape.config())
        linear = {n: tuple(m.weight.shape) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        del linear["lm_head"]
        assert linear == shape.modules


def test_transformers_loads_the_pair_as_it_was_written(pair):
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype="auto") for folder in pair]
    assert [model.dtype for model in models] == [torch.bfloat16] * 2
    assert sum(parameter.numel() for parameter in models[0].parameters()) == TINY.parameters
    assert all(len(list(folder.glob("model-*-of-00004.safetensors"))) == 4 for folder in pair)
    base, aligned = (model.state_dict() for model in models)
    moved = {name.removesuffix(".weight") for name in base if not torch.equal(base[name], aligned[name])}
    assert moved == set(TINY.modules)
    for name in TINY.modules:
        D = aligned[f"{name}.weight"].double() - base[f"{name}.weight"].double()
        assert torch.equal(displacement(pair, name, torch.float64), D)


def test_the_displacement_decays_in_noise_and_is_as_large_as_instruct_tunes_are(tmp_path):
    shape = Shape(256, 512, layers=1, heads=4, kv_heads=2, head_dim=64, vocabulary=48, tied=True)
    pair = write_pair(shape, tmp_path, shards=1)
    base = AutoModelForCausalLM.from_pretrained(pair[0]).get_submodule("model.layers.0.mlp.down_proj").weight
    D = displacement(pair, "model.layers.0.mlp.down_proj", torch.float64)
    assert 0.018 < (D.norm() / base.double().norm()).item() < 0.022
    sigma = torch.linalg.svdvals(D)
    flat = torch.linalg.svdvals(torch.randn(D.shape, generator=torch.Generator().manual_seed(0)).double())
    assert sigma[0] / sigma[15] > 2 * flat[0] / flat[15]
    # Beyond the directions that decay there is the noise alone, a third of the energy, spread over all of them.
    assert 0.05 < (sigma[64:].square().sum() / sigma.square().sum()).item() < 0.35


def test_the_pair_is_the_same_whatever_the_number_of_threads(tmp_path, pair):
    threads = torch.get_num_threads()
    torch.set_num_threads(2 if threads == 1 else 1)
    try:
        other = write_pair(TINY, tmp_path, shards=1)
    finally:
        torch.set_num_threads(threads)
    for name in TINY.modules:
        assert torch.allclose(*(displacement(each, name, torch.float64) for each in (pair, other)), atol=2e-4)
    one, another = (displacement(pair, f"model.layers.{i}.mlp.up_proj", torch.float64) for i in (0, 1))
    assert not torch.allclose(one, another, atol=1e-3)


def test_reading_touches_every_target_weight_of_both_checkpoints(pair, monkeypatch):
    read = []
    opened = fresh.safe_open

    class Spying:
        def __init__(self, *args):
            self.file, self.args = opened(*args), args

        def __enter__(self):
            self.inside = self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def get_slice(self, key):
            return self.inside.get_slice(key)

        def get_tensor(self, key):
            read.append((self.args[0].parent, key))
            return self.inside.get_tensor(key)

    monkeypatch.setattr(fresh, "safe_open", Spying)
    fresh.reading([str(folder) for folder in pair], list(TINY.modules))
    assert sorted(read) == sorted((folder, f"{name}.weight") for folder in pair for name in TINY.modules)
    assert len(files_with(pair[0], TINY.modules)) > 1


PEAK = """
import torch
from recipes.benchmarks.timing import resident_bytes
before = resident_bytes("VmHWM")
held = torch.ones((before - resident_bytes("VmRSS") + 200_000_000) // 4)
del held
print(resident_bytes("VmHWM") - before)
"""


@pytest.mark.slow
def test_memory_that_was_used_and_given_back_shows_in_the_peak():
    done = subprocess.run(
        [sys.executable, "-c", PEAK], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert 150e6 < int(done.stdout) < 250e6


@pytest.mark.slow
def test_a_second_start_that_finds_nothing_in_the_cache_is_an_error(pair, tmp_path):
    asked = {"base": str(pair[0]), "aligned": str(pair[1]), "names": list(TINY.modules), "rank": 2}
    with pytest.raises(RuntimeError, match="expected a second start to find the subspace in the cache"):
        fresh.in_fresh_process("again", **asked, cache=str(tmp_path / "empty"))


def test_the_dense_way_says_what_the_definition_says(pair):
    subspace = SafetySubspace.estimate(*pair, rank=3, progress=False)
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        basis = subspace[name]
        A, B = update_beside(basis.U.double(), basis.V.double(), 2)
        U, V = (torch.linalg.qr(side.double()).Q for side in (basis.U, basis.V))
        dense = dense_closest(A, B, 2.0, basis)
        for penalty in PENALTIES:
            exact = correct(A, B, U, V, PENALTIES[penalty], 2.0, rank="expand")
            assert torch.allclose(dense[penalty], 2.0 * exact.lora_B @ exact.lora_A, atol=1e-5)


def test_the_errors_of_an_estimate_are_small_where_it_is_exact_and_large_where_it_is_not(pair):
    exact = SafetySubspace.estimate(*pair, list(TINY.modules), rank=3, progress=False, method="exact")
    assert all(value < 1e-5 for errors in quality(TINY, pair, exact, 2).values() for value in errors_in(errors))
    name = "model.layers.1.self_attn.q_proj"
    mixed = SafetySubspace({**exact.bases, name: exact["model.layers.0.self_attn.q_proj"]}, {})
    assert all(value > 1e-2 for value in errors_in(quality(TINY, pair, mixed, 2)["32x32"]))


def errors_in(row: dict) -> list[float]:
    return [row[key] for key in ("energy_lost", "guard", "csulora")]


def test_exponents_are_found_again():
    costs = (*growth.MEASURED, "working_bytes")

    def point(factor, rank, modules):
        cost = 3.0 * factor**2 * rank**0.5 * modules
        return {"factor": factor, "rank": rank, "modules": modules, **{name: [cost] for name in costs}}

    by_axis = {
        "side": [point(factor, 16, 7) for factor in (0.25, 0.5, 1.0)],
        "rank": [point(0.5, rank, 7) for rank in (16, 32, 64)],
        "modules": [point(0.25, 16, modules) for modules in (7, 14, 28)],
        "cache": [{"checkpoint_bytes": size, "again": [0.2]} for size in (1e6, 4e6, 16e6)],
    }
    found = growth.slopes(by_axis)
    for axis, exponent in (("side", 2.0), ("rank", 0.5), ("modules", 1.0)):
        assert all(found[axis][cost] == pytest.approx(exponent) for cost in costs)
    assert found["cache"]["again"] == pytest.approx(0.0, abs=1e-12)


def test_points_of_an_axis_differ_in_that_alone_and_those_of_the_cache_have_equal_subspaces():
    asked = load_recipe("recipes/benchmark.yaml", []).benchmark
    by_axis = growth.points(asked)
    for axis, same in (("side", "layers rank"), ("rank", "factor layers"), ("modules", "factor rank")):
        assert len(by_axis[axis]) == 3
        assert len({tuple(getattr(point, name) for name in same.split()) for point in by_axis[axis]}) == 1
    entries = {
        sum(number * sum(size) * point.rank for size, number in shape.counts.items())
        for point in by_axis["cache"]
        for shape in [Shape.of(asked).scaled(point.factor, point.layers, 256)]
    }
    assert len(entries) == 1


def test_costs_of_larger_models_scale_as_their_weights_do_where_the_exponents_say_so():
    own = LLAMA["Llama-3.1-8B"]
    slopes = {
        "side": {"estimate": 2.0, "correction": 1.0, "log": 1.0, "working_bytes": 2.0},
        "rank": {"estimate": 0.0, "correction": 1.0, "log": 1.0},
    }
    measured = dict.fromkeys(("estimate", "again", "correction", "log"), 8.0)
    measured |= {"working_bytes": 1e6, "subspace_bytes": 1e8}
    rows = computed.larger_models(own, None, 16, measured, slopes)
    alone, shared = (row for row in rows if row["model"] == "Llama-3.1-8B")
    assert [alone[cost] for cost in measured if cost in alone] == pytest.approx([8.0] * 4 + [1e8])
    assert alone["peak_bytes"] == pytest.approx(1e6 + 1e8)
    assert shared["estimate"] == pytest.approx(1.0)  # 28 of 224 modules
    assert shared["again"] == alone["again"]
    largest = next(row for row in rows if row["model"] == "Llama-3.1-70B")
    weights = [sum(map(math.prod, LLAMA[f"Llama-3.1-{size}B"].modules.values())) for size in (70, 8)]
    assert largest["estimate"] / alone["estimate"] == pytest.approx(weights[0] / weights[1])
    assert largest["adapter_bytes"] == 4 * 16 * sum(map(sum, LLAMA["Llama-3.1-70B"].modules.values()))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("benchmark.kv_heads=3", "'benchmark.kv_heads': expected a divisor of the 32 heads, but got 3"),
        ("benchmark.rank=0", "'benchmark.rank': expected a whole number ≥ 1, but got 0"),
        ("benchmark.depths=[]", "'benchmark.depths': expected whole numbers ≥ 1, but got []"),
        ("benchmark.sizes=[0.3]", "'benchmark.head_dim': expected an even number, also times 0.3, but got 64"),
        ("benchmark.repeats=0", "'benchmark.repeats': expected a whole number ≥ 1, but got 0"),
        ("benchmark.scratch=/no/such/folder", "'benchmark.scratch': expected a folder that is there"),
        ("corrections={mine: {preset: guard}}", "'corrections': expected nothing beside 'benchmark.layers'"),
    ],
)
def test_shapes_that_cannot_be_measured_are_refused(capsys, override, said):
    assert main(["recipes/benchmark.yaml", "--dry-run", override]) == 2
    assert said in capsys.readouterr().err


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(tmp_path, capsys):
    sizes = ["benchmark.layers=100000", f"benchmark.scratch={tmp_path}", f"output={tmp_path / 'out'}"]
    assert main(["recipes/benchmark.yaml", *sizes]) == 2
    assert "of free disk for the pair" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_results_that_are_kept_are_those_of_the_recipe_as_it_is_and_the_pages_quote_them():
    kept = Path("recipes/results/benchmark")
    results = json.loads((kept / "results.json").read_text())
    words = results["command"].split()
    assert words[:4] == ["python", "-m", "recipes.run", "recipes/benchmark.yaml"]
    assert results["benchmark"] == benchmark.settings(load_recipe(words[3], words[4:]).benchmark)
    for axis, found in growth.slopes(results["growth"]["axes"]).items():
        assert results["growth"]["slopes"][axis] == pytest.approx(found)
    assert results["goals"] == goals.judge(results)
    assert (kept / "report.md").read_text() == report.to_markdown(results)
    assert page.between_marks(Path("csulora_callback/README.md").read_text()) == report.readme_section(results)


def test_a_page_gets_new_results_between_its_marks_and_keeps_all_else(tmp_path):
    kept, readme = Path("recipes/results/benchmark"), tmp_path / "README.md"
    for old in ("", "an older table\n"):
        readme.write_text(f"# Before\n\n{page.BEGIN}{old}{page.END}\nAfter, an older table\n")
        page.main(str(kept), str(readme))
        section = report.readme_section(json.loads((kept / "results.json").read_text()))
        assert readme.read_text() == f"# Before\n\n{page.BEGIN}{section}{page.END}\nAfter, an older table\n"


class Seen(TrainerCallback):
    """Which step each event followed on."""

    def __init__(self):
        self.steps = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.steps["log"] = state.global_step

    def on_save(self, args, state, control, **kwargs):
        self.steps["save"] = state.global_step

    def on_evaluate(self, args, state, control, **kwargs):
        self.steps["evaluation"] = state.global_step


def test_a_run_logs_saves_and_evaluates_after_a_step_of_its_own_each(tmp_path, pair):
    model = with_lora(AutoModelForCausalLM.from_pretrained(pair[1], dtype="auto"), 2)
    widths = []
    model.register_forward_pre_hook(lambda _, args, kwargs: widths.append(kwargs["input_ids"].shape), with_kwargs=True)
    seen = Seen()
    asked = Benchmark(layers=2, vocabulary=TINY.vocabulary, batch=2, length=16)
    clock = training._train(model, asked, [seen], tmp_path / "run")
    assert seen.steps == {"log": 2, "save": 3, "evaluation": 4}
    assert clock.seconds.keys() == {"step", *(f"after {what}" for what in ("step", "log", "save", "evaluation"))}
    assert widths == [(2, 16), *[(2, 8)] * 3, *[(1, 8)] * training.EVALUATED, (2, 8)]
    assert (tmp_path / "run/checkpoint-3/adapter_model.safetensors").exists()
