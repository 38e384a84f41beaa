"""What each penalty does to an update, for a person."""

IN_WORDS = {
    "csulora": "keeps what lies inside the safety subspace, attenuates what leaves it by its share (the paper's way)",
    "separable": "keeps what lies inside the safety subspace, attenuates what leaves it, each side by its share",
    "guard": "attenuates what lies inside the safety subspace, where alignment wrote, and leaves the rest to the task",
    "projection": "keeps only what lies fully inside the safety subspace",
    "data_aware": "keeps what the update does on the task, attenuates what it does on prompts that are to be refused",
    "content_aware": "as data_aware, by what the prompts say: without the prefix that all of them share",
    "table": "attenuates each block of the update by a constant of its own",
}
"""By the name of a :class:`~csulora_callback.Penalty`."""

NOTES = {
    "csulora": "no better than scaling the adapter down where it was measured; probes or guard kept more of the task"
}
"""What to know before shipping what a penalty gives, likewise; the numbers are in ``recipes/results/README.md``."""
