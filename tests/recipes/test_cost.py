"""The benchmark of what a data-aware penalty costs runs, and says so; times are nobody's business here."""

from recipes.benchmarks.cost import main


def test_it_measures_and_prints_what_the_callback_adds(capsys):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "layers": 1, "vocabulary": 32, "batch": 2, "length": 8}
    ratios = main([*(f"{name}={size}" for name, size in sizes.items()), "probes=3", "probe_length=4", "steps=2"])
    printed = capsys.readouterr().out
    assert all(ratio > 0 for ratio in ratios.values())
    assert all(what in printed for what in ratios)
