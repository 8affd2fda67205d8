"""Closeness without an absolute part: the norm of the difference over that of the expected tensor."""

import torch
from torch import Tensor


def assert_near(got: Tensor, expected: Tensor, units: float) -> None:
    """At most ``units`` machine epsilons of the dtype of ``got`` apart, relative, in the Frobenius norm."""
    expected = expected.to(torch.float64)
    distance = (got.detach().to(torch.float64) - expected.detach()).norm()
    assert distance <= units * torch.finfo(got.dtype).eps * expected.detach().norm(), (got, expected)
