"""The command ``csulora screen``: rows of fine-tuning data that the aligned model would refuse."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from csulora_callback.cli_options import JsonOption, examples
from csulora_callback.models.named import model_named
from csulora_callback.reporting.screening import print_screened, screened_json
from csulora_callback.reporting.streams import demand, show, working
from csulora_callback.screening import screen_data

logger = logging.getLogger(__name__)

EXAMPLES = examples(
    "csulora screen train.jsonl --model meta-llama/Llama-3.2-1B-Instruct",
    "csulora screen train.jsonl --model aligned/ -o refused.jsonl",
    "csulora screen org/dataset --model org/model@v1 --json | jq .share",
)


def screen(
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="A .json, .jsonl, .csv or .parquet, package:path, or a Hub dataset.")
    ],
    model: Annotated[
        str, typer.Option("--model", metavar="ALIGNED", help="The aligned model that is to be fine-tuned on it.")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="A .jsonl for the refused rows.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the rows of fine-tuning data whose prompt the aligned model refuses.

    The model is asked what stands before the last answer of every row, and the first 16 tokens of its greedy answer
    are judged. Rows are chat messages, ShareGPT conversations, prompt and completion, or Alpaca's instruction and
    output. A refused row is one to look at: data that answers it teaches the model not to refuse.
    """
    demand(
        output is None or (output.suffix == ".jsonl" and not output.is_dir()),
        f"`--output`: expected the name of a file that ends in .jsonl, but got {output}.",
    )
    demand(
        output is None or output.resolve() != Path(data).resolve(),
        f"`--output`: expected another file than the data, but got {output}, which it would replace.",
    )
    with working():
        done = screen_data(data, model_named(model))
        if output is not None:
            done.save(output)
    show(as_json, lambda: screened_json(done, output), lambda console: print_screened(console, done, output))
