# SPDX-License-Identifier: Apache-2.0
"""Float64 for golden values. CPUs differ in the last digits of a sum. In float32, a thresholded mask, a choice of the
best or a suppression of overlaps makes visible differences of them; in float64 they stay near 1e-13 of a value."""

from contextlib import contextmanager
from unittest import mock

import torch
from torch.utils._pytree import tree_map


@contextmanager
def float64():
    """Inside, code that asks for float32, or for no dtype, gets float64."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with mock.patch.object(torch, "float32", torch.float64):
            with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
                yield
    finally:
        torch.set_default_dtype(default)


def in_float64(model: torch.nn.Module, method: str = "forward") -> torch.nn.Module:
    """The model with weights in float64. Its method takes float32, too, and computes as inside `float64`."""
    run = getattr(model.double(), method)

    def double(value):
        return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    def run_in_float64(*arguments, **options):
        arguments, options = tree_map(double, (arguments, options))
        with float64():
            return run(*arguments, **options)

    setattr(model, method, run_in_float64)
    return model
