"""Memory is used again where it fits, and only there."""

import torch

from csulora_callback.method.reused import Reused


def test_a_device_without_its_number_is_the_one_that_it_stands_for():
    space = Reused()
    first = space.matrix("D", (2, 3), torch.float32, "cpu")
    assert space.matrix("D", (2, 3), torch.float32, "cpu:0").data_ptr() == first.data_ptr()
    assert space.matrix("S", (2, 3), torch.float32, "cpu").data_ptr() != first.data_ptr()
