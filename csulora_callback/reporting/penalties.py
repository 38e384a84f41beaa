"""What each penalty does to an update, for a person."""

from collections.abc import Mapping

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

NOTHING = "a strength of 0 corrects nothing: what is saved is what is trained"


def note_on(penalty: Mapping[str, object]) -> dict[str, str]:
    """What to know of a penalty, in its form as JSON, as a row of a table; none where there is nothing.

    Example:
        >>> note_on({"name": "guard", "strength": 0.0})
        {'note': 'a strength of 0 corrects nothing: what is saved is what is trained'}
        >>> note_on({"name": "guard", "strength": 3.0})
        {}
    """
    said = NOTHING if penalty.get("strength") == 0 else NOTES.get(penalty["name"])
    return {} if said is None else {"note": said}
