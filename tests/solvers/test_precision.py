"""Products of float32 numbers run in float32 where they must."""

import numpy as np
import pytest
import torch

from solvers import (
    Inclusion,
    ReLU,
    solve,
)
from solvers.precision import (
    FULL_SETTINGS,
    cast,
    in_autocast,
    may_lower_precision,
    use_full_precision,
)
from tests.problems import random_inclusion


def test_reduced_products_are_left_for_a_solve():
    seen = []

    class Spy(ReLU):
        def __call__(self, v):
            seen.append(torch.backends.mkldnn.matmul.fp32_precision)
            return torch.relu(v)

    setting = torch.backends.mkldnn.matmul
    before, setting.fp32_precision = setting.fp32_precision, "bf16"
    try:
        problem = random_inclusion(10, (6,), dtype=torch.float32)
        solve(Inclusion(problem.operator, problem.bias, Spy()), on_failure="raise")
        assert setting.fp32_precision == "bf16"
    finally:
        setting.fp32_precision = before
    assert set(seen) == {"ieee"}


def test_products_leave_autocast_and_reduced_settings_and_both_come_back():
    setting, x = torch.backends.mkldnn.matmul, torch.ones(2, 2)
    before, setting.fp32_precision = setting.fp32_precision, "bf16"
    try:
        assert may_lower_precision("cpu", convolutions=False)
        with torch.autocast("cpu", torch.bfloat16):
            with use_full_precision(x):
                assert (x @ x).dtype == torch.float32
                assert setting.fp32_precision in FULL_SETTINGS
            assert (x @ x).dtype == torch.bfloat16
        assert setting.fp32_precision == "bf16"
    finally:
        setting.fp32_precision = before
    assert not may_lower_precision("cpu", convolutions=False)


def test_autocast_is_off_on_a_device_that_has_none():
    assert not in_autocast("meta")


@pytest.mark.parametrize("flush", [False, True])
def test_float32_is_cast_exactly_also_where_denormal_numbers_are_read_as_zero(flush):
    numbers = [0.0, -0.0, 1.5, -3e-41, 1e-45, torch.inf]
    x = torch.tensor(numbers, dtype=torch.float32).requires_grad_()
    exact = torch.tensor([float(np.float32(number)) for number in numbers], dtype=torch.float64)
    torch.set_flush_denormal(flush)
    try:
        wide = cast(x, torch.float64)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(wide, exact)
    wide.sum().backward()
    assert torch.equal(x.grad, torch.ones(6))
