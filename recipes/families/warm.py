"""Imported by the process that trials are forked from, so that each finds done what it would do first.

That is the imports that transformers and accelerate leave for later, such as DeepSpeed's where it is installed.
Nothing is trained here: threads of autograd do not survive a fork.
"""

import gc
import io
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import recipes.families.trial  # noqa: F401
from recipes.families.catalogue import ALL_LINEAR, Entry
from recipes.families.pair import make_pair

with tempfile.TemporaryDirectory() as scratch, redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
    make_pair(Entry("llama", "causal", "LlamaForCausalLM", ALL_LINEAR), Path(scratch))
gc.freeze()  # what is there now is looked at by no collection in a trial
