"""Put what a benchmark found into a page: ``python -m recipes.benchmarks.page OUTPUT_FOLDER PAGE.md``.

It takes the place of what stands between the two marks there.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from recipes.benchmarks.report import readme_section
from recipes.files.points import write_whole

BEGIN, END = "<!-- benchmark -->\n", "<!-- end of benchmark -->\n"


def between_marks(text: str) -> str:
    """What stands there now."""
    return re.search(f"{BEGIN}(.*?){END}", text, re.DOTALL)[1]


def main(folder: str, page: str) -> None:
    """Read ``results.json`` in the folder and rewrite the page."""
    results = json.loads((Path(folder) / "results.json").read_text(encoding="utf-8"))
    text = Path(page).read_text(encoding="utf-8")
    write_whole(Path(page), text.replace(BEGIN + between_marks(text) + END, BEGIN + readme_section(results) + END))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m recipes.benchmarks.page", description="Quote a benchmark in a page."
    )
    parser.add_argument("folder", help="the benchmark's output folder")
    parser.add_argument("page", help="a Markdown file with both marks")
    main(**vars(parser.parse_args()))
