"""The pages that people read: links lead somewhere, and every command that CI runs stands in one place."""

import re
from pathlib import Path

import pytest

PAGES = [Path("README.md"), *(Path(room, "README.md") for room in ("csulora_callback", "recipes", "recipes/results"))]


def anchors(page: Path) -> set[str]:
    """As GitHub makes them from headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        place = (page.parent / file) if file else page
        assert place.exists(), target
        assert not anchor or anchor in anchors(place), target


def test_the_first_page_is_read_in_one_sitting():
    assert len(Path("README.md").read_text(encoding="utf-8").splitlines()) <= 200


def test_every_command_of_ci_stands_in_one_page():
    calls = re.findall(r"^\(?run_blocks ([\w ]+)", Path(".ci/run").read_text(encoding="utf-8"), re.MULTILINE)
    blocks = [*" ".join(calls).split(), "walk"]  # which test_walk.py runs
    marks = [mark for page in PAGES for mark in re.findall(r"<!-- ci: ([\w-]+) -->", page.read_text(encoding="utf-8"))]
    assert sorted(marks) == sorted(blocks)
    assert "<!-- ci: walk -->" in Path("tests/test_walk.py").read_text(encoding="utf-8")
