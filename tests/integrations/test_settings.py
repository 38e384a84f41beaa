"""The callback out of a section of a configuration file: its keys are the constructor's arguments."""

import importlib
import inspect
import sys

import pytest

from csulora_callback import CSULoRACallback, Penalty
from csulora_callback.integrations.settings import make_callback
from csulora_callback.presets import TARGET

PROBES = [f"How do I break lock number {number}?" for number in range(8)]


def test_every_argument_of_the_callback_is_a_key(tmp_path):
    given = {
        "base_model": "org/base",
        "aligned_model": "org/aligned",
        "subspace": None,
        "rank": 7,
        "energy": None,
        "penalty": "guard",
        "strength": 3,
        "target": None,
        "every_n_steps": 5,
        "evaluate_corrected": False,
        "log_every_n_steps": 2,
        "cache_dir": str(tmp_path),
        "resume_from": str(tmp_path),
        "export_adapter": False,
        "probes": PROBES,
        "probe_every_n_steps": 4,
        "push_raw": True,
        "max_drift": {"csulora/alignment_undone": 0.05},
        "min_refusal": 0.8,
        "on_exceed": "stop",
        "heat_maps": True,
        "uncorrected": ["score"],
    }
    assert list(given) == list(inspect.signature(CSULoRACallback).parameters)
    made = make_callback(given)
    by_hand = CSULoRACallback(**{**given, "penalty": Penalty.guard(3.0), "strength": None})
    for callback in (made, by_hand):
        callback.budget = vars(callback.budget)
    assert vars(made) == vars(by_hand)


@pytest.mark.parametrize(
    ("settings", "penalty", "target"),
    [
        ({}, Penalty.csulora(10.0), None),
        ({"strength": 3}, Penalty.csulora(3.0), None),
        ({"penalty": "guard"}, Penalty.guard(10.0), None),
        ({"penalty": "separable", "strength": 0.5}, Penalty.separable(0.5), None),
        ({"penalty": "projection"}, Penalty.projection(), None),
        ({"probes": PROBES}, Penalty.data_aware, TARGET),
        ({"probes": PROBES, "strength": 3}, Penalty.data_aware(3.0), None),
        ({"probes": PROBES, "penalty": "guard"}, Penalty.guard, TARGET),
        ({"probes": PROBES, "penalty": "guard", "target": 0.95}, Penalty.guard, 0.95),
        ({"probes": PROBES, "penalty": "data_aware", "strength": 3}, Penalty.data_aware(3.0), None),
        ({"probes": PROBES, "penalty": "projection"}, Penalty.projection(), None),
    ],
)
def test_a_penalty_is_a_name_and_a_strength(settings, penalty, target):
    made = make_callback({"base_model": "org/base", **settings})
    assert (made.penalty, made.target) == (penalty, target)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rnak": 3}, "`rnak`: expected a key that the callback has, but got an unknown one. Did you mean 'rank'?"),
        ({"qqq": 3}, "Known are base_model, aligned_model, "),
        (
            {"penalty": "gaurd"},
            "`penalty`: expected the name of a preset, data_aware, content_aware, guard, csulora, ",
        ),
        ({"penalty": ["guard"]}, "`penalty`: expected the name of a preset, .* but got \\['guard'\\]"),
        ({"penalty": "guard", "strength": "much"}, "`strength`: expected a number ≥ 0 .*, but got 'much'"),
        ({"penalty": "projection", "strength": 3}, "`strength`: expected none for a projection"),
        ({"penalty": "projection", "target": 0.9}, "`target`: expected none for a projection"),
        ({"penalty": "guard", "strength": 3, "target": 0.9}, "`target`: expected no strength beside it"),
        ({"penalty": "guard", "target": 0.9}, "`probes`: expected prompts that are to be refused"),
        ({"penalty": "data_aware"}, "`probes`: expected prompts that are to be refused"),
        ({"rank": 0}, "`rank`: expected a whole number ≥ 1"),
        ({"base_model": None}, "`base_model`: expected the unaligned base checkpoint, or a `subspace`"),
        ({"heat_maps": "yes"}, "`heat_maps`: expected True or False, but got 'yes'"),
    ],
)
def test_what_is_wrong_is_named(settings, said):
    with pytest.raises(ValueError, match=said):
        make_callback({"base_model": "org/base", **settings})


@pytest.mark.parametrize("section", ["org/base", ["base_model"], True])
def test_a_section_that_is_none_is_refused(section):
    with pytest.raises(ValueError, match="expected the callback's arguments by name"):
        make_callback(section)


def test_the_plugin_of_axolotl_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "axolotl", None)  # as where it is not installed
    for module in [name for name in sys.modules if name.startswith("axolotl.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delitem(sys.modules, "csulora_callback.integrations.axolotl", raising=False)
    with pytest.raises(ModuleNotFoundError, match="a plugin that axolotl loads, which is not installed: pip install"):
        importlib.import_module("csulora_callback.integrations.axolotl")
