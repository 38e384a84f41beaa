"""Samples of what is given whole: the same ones wherever they are drawn."""

import torch

from csulora_callback.models.task_rows import read_task
from csulora_callback.models.training_rows import fixed_sample


def test_a_sample_does_not_depend_on_the_default_device():
    rows = [[token] for token in range(100)]
    expected = read_task(rows, None)
    with torch.device("meta"):
        assert fixed_sample(100, 64) == [row[0] for row in expected.rows]
        assert read_task(rows, None) == expected
